"""What is known of an architecture before torch is loaded: the `About(...)` at the top of its file
in `fastsae/sae/architectures/`, read without running that file.

Bounds and choices of settings, the model card and an up-to-date run need no more than this.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "sae" / "architectures"
# the registry: a file of FOLDER each, in the order in which --help names them
NAMES = ("topk", "batchtopk", "standard", "jumprelu", "gated", "aligned")
FORMER_SWITCHES = {"USE_BATCH_TOPK": "batchtopk"}  # settings that became an architecture


@dataclass(frozen=True)
class About:
    """What others need to know of an architecture; all values are literals.

    name: as the setting ARCHITECTURE has it, and the name of the file.
    does: what makes a feature active at inference, for the model card.
    starts_from: architectures of which one can be given as INIT_FROM.
    picks_k: training keeps the K largest (of a token or a batch): `sparse_step`, prefixes, aux-k,
        and a loss relative to the variance. Else training goes through `Architecture.loss`.
    aims_at_k: training drives the number of active features to K.
    coefficient: the name under which results record the weight of what the loss adds to the squared
        error (the setting SPARSITY_COEFFICIENT), if it adds something.
    weight: that weight where none is given.
    saved_as: the architecture it is kept as, where it computes the same as a simpler one.
    in_hypothesaes: `hypothesaes.sae.load_model` reads its checkpoints.
    saelens, sparsify, dictionary_learning: what these libraries call what it computes; None = they
        cannot hold it.
    fresh_length: the length of a resampled feature's encoder row, relative to the live ones'.
    """

    name: str
    does: str
    starts_from: tuple[str, ...]
    picks_k: bool = False
    aims_at_k: bool = False
    coefficient: str | None = "L1_COEFFICIENT"
    weight: float = 5.0
    saved_as: str | None = None
    in_hypothesaes: bool = False
    saelens: str | None = None
    sparsify: str | None = None
    dictionary_learning: str | None = None
    fresh_length: float = 1.0

    @property
    def form(self) -> str:
        """The architecture of its saved checkpoints."""
        return self.saved_as or self.name

    @property
    def text(self) -> str:
        """What it computes, and as what it was trained if that differs."""
        return self.name if self.form == self.name else f"{self.form} (trained as {self.name})"


def declared(path: Path) -> About:
    """The `About(...)` of an architecture's file. Raises ValueError where a value is no literal."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next(
        node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "About"
    )
    return About(**{str(each.arg): ast.literal_eval(each.value) for each in call.keywords})


ARCHITECTURES = {name: declared(FOLDER / f"{name}.py") for name in NAMES}
# trained by autograd through a dense forward pass, without a fixed number of active features
DENSE = tuple(name for name, about in ARCHITECTURES.items() if not about.picks_k)
