"""Small real files."""

import base64
import io

import numpy as np
import soundfile
from PIL import Image


def png(seed=0, size=(12, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def wav(seed=0, seconds=1.0, rate=16_000):
    stream = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(stream, samples, rate, format="WAV")
    return stream.getvalue()


def b64(data):
    return base64.b64encode(data).decode()
