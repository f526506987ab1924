"""Generated inputs: no two alike, and none like those of an earlier run, so that no cache answers for the model."""

import io
import json
from typing import Any

import numpy as np
import soundfile
from PIL import Image

_NOUNS = ("dog", "cat", "woman", "child", "boat", "street", "river", "violin", "engine", "thunder", "bridge")
_OTHERS = ("the", "a", "small", "red", "old", "runs", "plays", "sleeps", "beside", "under", "with", "near")
_RATE = 44_100


class Inputs:
    def __init__(self) -> None:
        self._rng = np.random.default_rng()  # unseeded: Redis, where one is configured, outlives a run

    def text(self) -> str:
        """A sentence of twelve words and a number."""
        return f"{' '.join(self._rng.choice(_NOUNS + _OTHERS, 12))} {self._rng.integers(10**9)}"

    def label(self) -> str:
        """A word and a number."""
        return f"{self._rng.choice(_NOUNS)} {self._rng.integers(10**9)}"

    def image(self) -> bytes:
        """A JPEG of 640 × 480 with large shapes and some grain, about 60 kB."""
        coarse = self._rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        grain = self._rng.integers(-8, 9, (480, 640, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def audio(self) -> bytes:
        """A WAV of five seconds at 44.1 kHz: three tones in noise."""
        time = np.arange(5 * _RATE) / _RATE
        tones = sum(np.sin(2 * np.pi * hertz * time) for hertz in self._rng.uniform(80, 6_000, 3))
        buffer = io.BytesIO()
        samples = 0.2 * tones + self._rng.normal(0, 0.02, len(time))
        soundfile.write(buffer, samples, _RATE, format="WAV", subtype="PCM_16")
        return buffer.getvalue()

    def vectors(self, count: int, dimensions: int) -> np.ndarray:
        """(count, dimensions) float32, of no particular length."""
        return self._rng.standard_normal((count, dimensions), dtype=np.float32)

    def body(self, modality: str, **request: Any) -> dict[str, Any]:
        """httpx2's arguments that post one new input: text as JSON, a medium as a file; `request` is the rest."""
        if modality == "text":
            return {"json": {"inputs": [self.text()], **request}}
        data = self.image() if modality == "image" else self.audio()
        return {"files": {"file": (modality, data)}, "data": {"request": json.dumps(request)}}
