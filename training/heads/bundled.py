"""A bundle read back into training: its towers as frozen encoders, its text projector as a head."""

from service.contract.bundle import Bundle, Modality
from service.contract.endpoint import EndpointPreprocessing
from service.contract.tokens import TextPreprocessing
from training.encoders import FrozenEncoder, weights_sha256
from training.errors import TrainingError
from training.heads.projector import Head, NoHead
from training.heads.trained import bank_sizes, read_file
from training.recipe import ProjectorSpec

PROJECTORS = "projectors.safetensors"


class BundledError(TrainingError):
    """Raised where a bundle has not what training needs of it: the message says what."""


def as_encoder(bundle: Bundle, modality: Modality) -> FrozenEncoder:
    """A tower as a frozen encoder whose features are the space's unit vectors (N, D), by the graph that is served."""
    tower = bundle.manifest.towers[modality]
    tokenizer = None
    if isinstance(tower.preprocessing, EndpointPreprocessing):
        raise BundledError(f"{bundle.path}: an embedding API makes its texts' vectors: name it in a recipe")
    if isinstance(tower.preprocessing, TextPreprocessing):
        tokenizer = bundle.path / tower.preprocessing.tokenizer
    return FrozenEncoder(
        modality=modality,
        source=f"{bundle.manifest.name}/{tower.file}",
        width=bundle.manifest.dimensions,
        weights_sha256=tower.sha256,
        preprocessing=tower.preprocessing,
        licence=tower.encoder.licence,
        onnx=bundle.tower_path(modality),
        tokenizer=tokenizer,
    )


def text_head(bundle: Bundle) -> Head:
    """The frozen text head, rebuilt from projectors.safetensors. Raises BundledError.

    A text head has no signed power, so that its tensors and its kind say all; the manifest's hash confirms it.
    """
    described = bundle.manifest.towers["text"].projector
    if described.kind == "bound":
        raise BundledError(
            f"{bundle.path}: its text tower mixes two spaces, and is no head to align to: extend one of them, then bind"
        )
    if described.kind == "none":
        return NoHead("text", described.features).eval()
    if described.kind == "glu" or described.kind == "attention":
        raise BundledError(f"{bundle.path}: heads of the kind {described.kind} are gone: there is none to align to")
    tensors, _ = read_file(bundle.path / PROJECTORS)
    state = {key.removeprefix("text."): value for key, value in tensors.items() if key.startswith("text.")}
    up = state.get("pooled.up.weight")
    hidden = 1 if up is None else len(up)
    spec = ProjectorSpec(
        kind=described.kind,
        dimensions=bundle.manifest.dimensions,
        hidden=hidden,
        querybank=int("reserve.reach" in state),
    )
    head = Head("text", described.features, spec, banks=bank_sizes(state))
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise BundledError(f"{bundle.path / PROJECTORS} holds no {described.kind} text projector: {error}") from None
    if weights_sha256(head) != described.weights_sha256:
        raise BundledError(f"{bundle.path / PROJECTORS}: its text projector is not the one of the text tower")
    return head.eval().requires_grad_(False)
