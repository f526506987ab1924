"""Load, as locust makes it. Name the scenarios to run; without a name all run at once, in equal parts.

locust -f deploy/load/locustfile.py --headless --host http://127.0.0.1:8000 -u 16 -r 16 -t 30s Texts
locust -f deploy/load/locustfile.py --host http://127.0.0.1:8000      # with its page, on http://127.0.0.1:8089

Texts, Photographs and Sounds embed one input a request, Labels labels a photograph, Searches searches and, once in ten
times, writes; Overload asks for more than there is, and takes 429 for the answer that it should get. No input comes
twice, so that no cache answers. LOAD_KEY is sent as an API key; LOAD_SEED makes other inputs.
"""

import base64
import io
import itertools
import os
import wave

import numpy as np
from locust import FastHttpUser, constant, task
from PIL import Image, ImageDraw

_WORDS = """
a the of two red blue small old dog cat child man street beach snow water night rain bell engine plays runs sits under
beside with near bright quiet crowd window horse guitar market boat garden bridge
""".split()  # noqa: SIM905
_SEED = int(os.environ.get("LOAD_SEED", "0"))
_users = itertools.count()


class _User(FastHttpUser):
    abstract = True
    wait_time = constant(0)
    network_timeout = 60.0
    connection_timeout = 10.0

    def on_start(self) -> None:
        number = next(_users)
        self.rng = np.random.default_rng([_SEED, number])
        self.name, self.written = f"{_SEED}-{number}", 0
        if key := os.environ.get("LOAD_KEY"):
            self.client.client.default_headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: dict, *, name: str | None = None, refusals: bool = False) -> None:
        with self.client.post(path, json=body, name=name or path, catch_response=True) as answer:
            if answer.status_code == 429 and refusals:
                answer.request_meta["name"] = f"{name or path} refused"
                answer.success()
            elif answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")

    def caption(self) -> str:
        return " ".join(self.rng.choice(_WORDS, size=12))

    def photograph(self) -> str:
        """320 × 240, a JPEG of about 15 kB: shapes on a rough ground, as base64."""
        ground = self.rng.normal(128, 25, (60, 80, 3)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(ground).resize((320, 240), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, size = self.rng.integers(0, (300, 220, 80))
            draw.ellipse((x, y, x + size, y + size), fill=tuple(self.rng.integers(0, 255, 3).tolist()))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        return base64.b64encode(file.getvalue()).decode()

    def sound(self) -> str:
        """Two seconds at 16 kHz, a WAV of 64 kB: a tone in noise, as base64."""
        time = np.arange(32_000) / 16_000
        tone = 8_000 * np.sin(2 * np.pi * self.rng.uniform(100, 2_000) * time) + self.rng.normal(0, 800, len(time))
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(16_000)
            out.writeframes(tone.astype("<i2").tobytes())
        return base64.b64encode(file.getvalue()).decode()


class Texts(_User):
    @task
    def embed(self) -> None:
        self.ask("/embed", {"inputs": [self.caption()]})


class Photographs(_User):
    @task
    def embed(self) -> None:
        self.ask("/embed", {"inputs": [{"image": self.photograph()}]})


class Sounds(_User):
    @task
    def embed(self) -> None:
        self.ask("/embed", {"inputs": [{"audio": self.sound()}]})


class Labels(_User):
    @task
    def label(self) -> None:
        labels = ["a dog", "a cat", "a street", "the sea", "food", "a crowd", "an instrument", "a vehicle"]
        self.ask("/classify", {"inputs": [{"image": self.photograph()}], "labels": labels})


class Searches(_User):
    @task(9)
    def search(self) -> None:
        self.ask("/search", {"query": self.caption(), "top_k": 10})

    @task(1)
    def write(self) -> None:
        self.written += 1
        item = {"id": f"{self.name}-{self.written}", "text": self.caption(), "metadata": {"n": self.written}}
        self.ask("/items", {"items": [item]})


class Overload(_User):
    @task
    def embed(self) -> None:
        self.ask("/embed", {"inputs": [self.caption() for _ in range(8)]}, refusals=True)
