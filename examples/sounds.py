"""Synthesise everyday sounds to 16 kHz mono WAV files: media for the demo that need no download and no licence.

    python -m examples.sounds FOLDER

Every sound is deterministic. They are recipes of sound design (modal bells, filtered noise,
pulse trains through resonances), kept because a sound classifier names them rightly: tests/examples/test_sounds.py.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 16_000
SECONDS = 5.0
SEED = 1

Samples = NDArray[np.float64]
Generator = np.random.Generator


def _times(seconds: float = SECONDS) -> Samples:
    return np.arange(int(seconds * RATE)) / RATE


def _peak(samples: Samples) -> float:
    return float(np.abs(samples).max())


def _band(noise: Samples, low: float, high: float, slope: float = 0.0) -> Samples:
    """Keep low..high Hz of a signal (soft edges), with a spectral tilt of `slope` as a power of the frequency."""
    frequency = np.fft.rfftfreq(len(noise), 1 / RATE)
    gain = np.maximum(frequency, 20.0) ** slope
    gain *= 1 / (1 + (low / np.maximum(frequency, 1e-3)) ** 8) / (1 + (frequency / high) ** 8)
    shaped = np.fft.irfft(np.fft.rfft(noise) * gain, len(noise))
    return shaped / _peak(shaped)


def _tone(frequency: Samples, harmonics: tuple[float, ...]) -> Samples:
    """A periodic tone of the instantaneous `frequency` (Hz); harmonics above the Nyquist frequency are left out."""
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    wave = np.zeros_like(phase)
    for number, level in enumerate(harmonics, start=1):
        wave += level * np.sin(number * phase) * (number * frequency < RATE / 2)
    return wave


def _place(track: Samples, sound: Samples, second: float) -> None:
    """Mix a sound into the track in place, from `second` on; what runs past the end is cut."""
    start = int(second * RATE)
    room = track[start : start + len(sound)]
    room += sound[: len(room)]


def _room(dry: Samples, random: Generator, seconds: float, level: float) -> Samples:
    """Add the diffuse echo of a room: exponentially decaying noise as an impulse response."""
    times = _times(seconds)
    impulse = random.standard_normal(len(times)) * np.exp(-6.9 * times / seconds)
    impulse /= np.sqrt((impulse**2).sum())
    length = len(dry) + len(impulse) - 1
    wet = np.fft.irfft(np.fft.rfft(dry, length) * np.fft.rfft(impulse, length), length)[: len(dry)]
    return dry + level * np.asarray(wet)


def siren(random: Generator) -> Samples:
    """A wailing emergency siren: a buzzing tone that sweeps between 600 and 1,400 Hz."""
    times = _times()
    sweep = 1000 - 400 * np.cos(2 * np.pi * times / 2.5)
    tone = np.tanh(1.5 * _tone(sweep, (1.0, 0.5, 0.5, 0.25, 0.2, 0.1)))
    return _room(tone, random, 1.2, 0.4) + 0.01 * random.standard_normal(len(times))


def rain(random: Generator) -> Samples:
    """Steady rain: the hiss of many far drops, and near drops that splash one by one."""
    hiss = _band(random.standard_normal(len(_times())), 300, 7_900, -0.2)
    drops = np.zeros_like(hiss)
    for second in random.uniform(0, SECONDS, 2_500):
        length = _times(random.uniform(0.003, 0.02))
        bubble = np.sin(2 * np.pi * random.uniform(1_500, 6_000) * length)
        splash = (0.6 * random.standard_normal(len(length)) + bubble) * np.exp(-length * random.uniform(300, 900))
        _place(drops, random.exponential(0.3) * splash, second)
    return 0.5 * hiss + 3 * drops / _peak(drops)


def clock(random: Generator) -> Samples:
    """A mechanical clock: tick and tock by turns, each a dry click and its rebounds in the case."""
    track = np.zeros_like(_times())
    for beat in range(int(SECONDS / 0.5)):
        length, pitch = _times(0.08), 1.0 if beat % 2 else 0.9
        tick = 10 * random.standard_normal(len(length)) * np.exp(-900 * length)
        for frequency, decay, level in ((4_000, 1_800, 1.0), (5_000, 2_600, 0.8), (6_800, 3_200, 0.6)):
            tick += level * np.sin(2 * np.pi * frequency * pitch * length) * np.exp(-decay * length)
        for rebound, level in ((0.0, 1.0), (0.02, 0.4), (0.035, 0.2)):
            _place(track, level * (1.0 if beat % 2 else 0.7) * tick, 0.1 + 0.5 * beat + rebound)
    return _room(track, random, 0.3, 0.02) + 0.01 * random.standard_normal(len(track))


def church_bell(random: Generator) -> Samples:
    """Three church bells rung in turn: hum, prime, minor third, fifth, nominal and higher modes of cast bells."""
    track = np.zeros_like(_times())
    modes = (  # ratio to the prime, level, decay per second
        (0.5, 0.5, 0.5), (1.0, 0.8, 0.6), (1.183, 0.7, 0.9), (1.506, 0.3, 1.1), (2.0, 1.0, 1.2), (2.514, 0.4, 1.8),
        (2.662, 0.35, 1.9), (3.011, 0.4, 2.1), (4.166, 0.35, 2.8), (5.433, 0.2, 3.6), (6.796, 0.15, 4.8),
    )  # fmt: skip
    for strike in range(8):
        length, prime = _times(4.0), 500 * (1, 1.19, 1.335)[strike % 3]
        bell = random.standard_normal(len(length)) * np.exp(-100 * length)
        for ratio, level, decay in modes:
            for split in (-0.7, 0.7):  # a bell is never quite round: each mode is a pair that beats
                phase = 2 * np.pi * (prime * ratio + split) * length + random.uniform(0, 6)
                bell += level * np.exp(-decay * length) * np.sin(phase)
        _place(track, random.uniform(0.7, 1.0) * bell, 0.05 + 0.6 * strike)
    return _room(track, random, 3.0, 1.5)


def sea_waves(random: Generator) -> Samples:
    """Waves on a beach: a roar that swells and breaks, and the hiss of the water running back."""
    times = _times()
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * times / 4.0)) ** 2
    wash = (0.5 - 0.5 * np.cos(2 * np.pi * (times - 0.7) / 4.0)) ** 3
    roar = _band(random.standard_normal(len(times)), 60, 900, -0.6)
    hiss = _band(random.standard_normal(len(times)), 500, 7_000, -0.4)
    return (0.15 + swell) * roar + (0.1 + wash) * hiss


def thunder(random: Generator) -> Samples:
    """A thunderstorm: rumbles that roll away, a soft crack before them, rain all along."""
    times = _times()
    envelope = np.zeros_like(times)
    for second, level, decay in (
        (0.3, 1.0, 0.45),
        (0.9, 0.6, 0.36),
        (1.6, 0.8, 0.3),
        (2.5, 0.5, 0.27),
        (3.3, 0.3, 0.24),
    ):
        since = np.maximum(times - second, 0)
        envelope += level * (1 - np.exp(-4 * since)) * np.exp(-decay * since)
    envelope *= 1 + 0.5 * _band(random.standard_normal(len(times)), 0.5, 8)
    rumble = envelope * _band(random.standard_normal(len(times)), 25, 500, -1.2)
    crack = np.where(times > 0.3, np.exp(-3 * np.maximum(times - 0.3, 0)), 0.0)
    crack *= _band(random.standard_normal(len(times)), 80, 1_500, -0.5)
    return rumble + 0.1 * crack + 0.05 * _band(random.standard_normal(len(times)), 400, 7_000, -0.3)


def crickets(random: Generator) -> Samples:
    """Crickets at night: bursts of short pulses near 4.5 kHz from several insects."""
    times = _times()
    track = np.zeros_like(times)
    for pitch, level, period, offset in ((4_500, 1.0, 0.62, 0.0), (4_750, 0.5, 0.55, 0.2), (4_300, 0.35, 0.7, 0.33)):
        second = offset
        while second < SECONDS:
            for pulse in range(4):
                length = _times(0.025)
                envelope = np.sin(np.pi * length / 0.025) ** 2
                chirp = envelope * np.sin(2 * np.pi * pitch * (1 + 0.01 * length / 0.025) * length)
                _place(track, level * random.uniform(0.85, 1.0) * chirp, second + 0.04 * pulse)
            second += period * random.uniform(0.97, 1.03)
    return _room(track, random, 0.5, 0.1) + 0.01 * random.standard_normal(len(times))


def engine(random: Generator) -> Samples:
    """A petrol engine that is revved: uneven exhaust pulses, and the noise they push through the pipe."""
    times = _times()
    firing = 40 + 120 * np.maximum(0, np.sin(2 * np.pi * times / 2.5 - 0.6)) ** 1.5
    firing *= 1 + 0.05 * _band(random.standard_normal(len(times)), 1, 15)
    phase = np.cumsum(firing) / RATE
    cycle = phase.astype(int)
    strength = np.where(np.arange(cycle[-1] + 1) % 2, 1.0, 0.6) * (1 + 0.2 * random.standard_normal(cycle[-1] + 1))
    pulses = strength[cycle] * np.exp(-12 * (phase % 1))
    noise = strength[cycle] * np.exp(-5 * (phase % 1)) * random.standard_normal(len(times))
    exhaust = _band(pulses - pulses.mean(), 40, 400, -0.3) + 2 * _band(noise, 80, 1_500, -0.7)
    exhaust += 0.2 * _band(noise, 500, 5_000, -0.2)
    heard = _room(exhaust * (0.4 + firing / 160), random, 0.25, 0.6)
    return np.tanh(2.4 * heard / _peak(heard))


def birds(random: Generator) -> Samples:
    """Songbirds: short whistled phrases of rising and falling notes between 2.5 and 6 kHz."""
    track = np.zeros_like(_times())
    second = 0.1
    while second < SECONDS:
        start, notes = random.uniform(2_800, 4_800), random.integers(3, 7)
        glide = random.uniform(-0.3, 0.35)
        for _ in range(notes):
            duration = random.uniform(0.05, 0.12)
            length = _times(duration)
            sweep = start * (1 + glide * length / duration + 0.04 * np.sin(2 * np.pi * 45 * length))
            note = np.sin(np.pi * length / duration) ** 1.5 * _tone(sweep, (1.0, 0.08))
            _place(track, random.uniform(0.6, 1.0) * note, second)
            second += duration + random.uniform(0.015, 0.05)
        second += random.uniform(0.1, 0.45)
    return _room(track, random, 0.8, 0.15) + 0.004 * random.standard_normal(len(track))


def alarm_clock(random: Generator) -> Samples:
    """A digital alarm clock: four short beeps, a rest, again."""
    track = np.zeros_like(_times())
    for group in range(5):
        for beep in range(4):
            length = _times(0.075)
            tone = np.sign(np.sin(2 * np.pi * 2_048 * length)) * np.minimum(1, np.minimum(length, length[::-1]) * 400)
            _place(track, tone, 0.1 + group + 0.13 * beep)
    return _room(track, random, 0.3, 0.1) + 0.003 * random.standard_normal(len(track))


def cat(random: Generator) -> Samples:
    """A cat that meows: a voice whose pitch rises and falls while the mouth opens and closes."""
    track = np.zeros_like(_times())
    for second, duration, pitch in ((0.2, 0.7, 700), (1.8, 0.8, 665), (3.6, 0.7, 735)):
        length = _times(duration)
        position = length / duration
        melody = pitch * (1 + 0.25 * np.sin(np.pi * position**0.5) + 0.09 * position)
        mouth = np.sin(np.pi * position) ** 1.3
        first, second_formant = 700 + 900 * mouth, 2_400 - 500 * position + 400 * mouth
        phase, voice = 2 * np.pi * np.cumsum(melody) / RATE, np.zeros_like(length)
        for number in range(1, 12):
            frequency = number * melody
            formants = np.exp(-(((frequency - first) / 300) ** 2))
            formants += np.exp(-(((frequency - second_formant) / 400) ** 2))
            voice += (formants + 0.05 / number) * np.sin(number * phase) * (frequency < 7_500)
        envelope = np.minimum(1, 4 * position) ** 2 * np.minimum(1, 2 - 2 * position) ** 2
        _place(track, np.tanh(2 * envelope * voice), second)
    return _room(track, random, 0.3, 0.1) + 0.001 * random.standard_normal(len(track))


SOUNDS: Mapping[str, Callable[[Generator], Samples]] = {
    recipe.__name__: recipe
    for recipe in (
        siren,
        rain,
        clock,
        church_bell,
        sea_waves,
        thunder,
        crickets,
        engine,
        birds,
        alarm_clock,
        cat,
    )
}


def synthesise(name: str, seed: int = SEED) -> NDArray[np.float32]:
    """The sound called `name` (a key of SOUNDS): float32 (80000,), peak 0.8. Raises KeyError."""
    samples = SOUNDS[name](np.random.default_rng(seed))
    return (0.8 * samples / _peak(samples)).astype(np.float32)


def write_sounds(folder: Path) -> dict[str, Path]:
    """Write every sound as 16-bit WAV into `folder`, made if it is absent; returns name → file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.wav" for name in SOUNDS}
    for name, file in files.items():
        soundfile.write(file, synthesise(name), RATE, subtype="PCM_16")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.sounds", description="Synthesise the demo's sounds.")
    parser.add_argument("folder", type=Path)
    for file in write_sounds(parser.parse_args().folder).values():
        print(file)
