"""Pixels as the image processors of transformers (their Pillow backend) make them, bit for bit, on photographs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileNetV1ImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from service.contract.images import preprocess_image
from training.preprocessors import EncoderError, image_preprocessing

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Return pictures of odd sizes, wide and tall, smaller and larger than what a model takes."""
    named = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in ("cat", "coffee")]
    return [named[0], named[1].crop((3, 5, 460, 372)), named[0].crop((40, 0, 157, 299)), named[1].crop((0, 0, 77, 301))]


@pytest.fixture(scope="module")
def snapshots(data_root: Path) -> list[Image.Image]:
    files = sorted((data_root / "data/flickr8k/images").iterdir())[:400:100]
    return [Image.open(file).convert("RGB") for file in files]


PROCESSORS = {
    "vit": ViTImageProcessorPil(),
    "vit lanczos": ViTImageProcessorPil(resample=1, size={"height": 180, "width": 131}),
    "siglip": SiglipImageProcessorPil(),
    "siglip 384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "clip": CLIPImageProcessorPil(),
    "clip 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}, **IMAGENET),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 224}, **IMAGENET),
    "convnext 384": ConvNextImageProcessorPil(**IMAGENET),
    "resnet": ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.95, resample=3, **IMAGENET),
    "mobilenet v1": MobileNetV1ImageProcessorPil(),
    "mobilenet v2": MobileNetV2ImageProcessorPil(),
    "odd crop": BitImageProcessorPil(size={"shortest_edge": 101}, crop_size={"height": 57, "width": 100}),
    "squashed and cropped": CLIPImageProcessorPil(size={"height": 251, "width": 240}, do_center_crop=True),
    "not normalised": ViTImageProcessorPil(do_normalize=False),
    **{f"resample {code}": CLIPImageProcessorPil(resample=code) for code in RESAMPLINGS},
}


def check(processor: Any, folder: Path, photographs: list[Image.Image], most: float = 0.0) -> None:
    processor.save_pretrained(folder)
    spec = image_preprocessing(folder, "any")
    for photograph in photographs:
        theirs = processor(photograph, return_tensors="np")["pixel_values"][0]
        ours = preprocess_image(photograph, spec)
        assert ours.dtype == np.float32 and ours.flags.c_contiguous
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= most


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str, tmp_path: Path, photographs: list[Image.Image]) -> None:
    check(PROCESSORS[name], tmp_path, photographs)


@pytest.mark.parametrize("name", ["vit", "siglip", "clip", "dinov2", "convnext", "resnet", "mobilenet v2"])
def test_pixels_of_real_snapshots(name: str, tmp_path: Path, snapshots: list[Image.Image]) -> None:
    check(PROCESSORS[name], tmp_path, snapshots)


@pytest.mark.parametrize("size", [(600, 31), (3, 290)])
def test_a_strip_is_resized_where_it_is_cropped(
    tmp_path: Path, photographs: list[Image.Image], size: tuple[int, int]
) -> None:
    processor = CLIPImageProcessorPil()
    processor.save_pretrained(tmp_path)
    spec = image_preprocessing(tmp_path, "clip")
    strip = photographs[1].crop((0, 0, *size))
    difference = np.abs(preprocess_image(strip, spec) - processor(strip, return_tensors="np")["pixel_values"][0])
    assert difference.max() <= 2.01 / 255 / min(spec.std)  # levels of 8 bits, where a place is rounded


@pytest.mark.parametrize("changes", [{"rescale_factor": 1 / 127.5}, {"do_rescale": False}])
def test_another_scale_is_folded_into_the_statistics(
    tmp_path: Path, photographs: list[Image.Image], changes: dict[str, Any]
) -> None:
    check(ViTImageProcessorPil(**changes), tmp_path, photographs[:2], most=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # As ALIGN's, and as EfficientNet's own classifiers.
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False, "include_top": False},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True, **IMAGENET},
    ],
)
def test_an_efficientnet_is_squashed_cropped_and_moved(
    tmp_path: Path, photographs: list[Image.Image], changes: dict[str, Any]
) -> None:
    check(EfficientNetImageProcessorPil(do_center_crop=True, **changes), tmp_path, photographs, most=1e-5)


@pytest.mark.parametrize(
    ("model_type", "stated", "expected"),
    [
        ("vit", {"size": 224}, {"resize": "squash", "height": 224, "resample": "bilinear"}),
        ("clip", {"size": 224, "crop_size": 224}, {"shortest_edge": 224, "width": 224, "resample": "bicubic"}),
        ("convnext", {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224}, {"shortest_edge": 256}),
        ("resnet", {"size": 384}, {"resize": "squash", "height": 384, "shortest_edge": None}),
        ("dinov2", {"image_processor_type": "BitImageProcessorFast", "crop_size": 196}, {"height": 196}),
    ],
)
def test_older_files_mean_what_they_meant(
    tmp_path: Path, model_type: str, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    spec = image_preprocessing(tmp_path, model_type).model_dump()
    assert {key: spec[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "vit.*image_processor_type Donut is not read here"),
        ({"do_resize": False}, "vit.*do_resize is false"),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "vit.*longest_edge"),
        ({"size": {"shortest_edge": 224}}, "vit.*fixes no input size"),
        (
            {"size": {"height": 200, "width": 256}, "do_center_crop": True, "crop_size": 224},
            "squashed .200, 256. is no",
        ),
        ({"resample": 9}, "resample 9"),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 200, "crop_size": 224},
            "vit.*shortest_edge 200 is less than the crop",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, stated: dict[str, Any], said: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(EncoderError, match=said):
        image_preprocessing(tmp_path, "vit")
