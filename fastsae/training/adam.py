"""Adam (arXiv 1412.6980) by PyTorch's fused kernel.

torch.optim.Adam calls the same kernel, but importing it loads PyTorch's compiler, which takes more
than a second, and a step spends a third of a millisecond around the kernel: a tenth of a small
autoencoder's step.
"""

from collections.abc import Iterable
from typing import Any

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Adam:
    """Steps of `parameters`, all of which have gradients, with a `learning_rate` that may be
    changed.

    state[parameter] holds the moments `exp_avg` and `exp_avg_sq`, laid out as the parameter is, and
    the number of `step`s, a 0-d tensor.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self.state = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.detach()),
                "exp_avg_sq": torch.zeros_like(parameter.detach()),
            }
            for parameter in self.parameters
        }

    @torch.no_grad()
    def step(self, divisor: torch.Tensor | None = None) -> None:
        """One step along the gradients, which are divided by `divisor`, 0-d, if it is given."""
        states = list(self.state.values())
        for state in states:
            state["step"] += 1
        torch._fused_adam_(
            [*self.parameters],
            [parameter.grad for parameter in self.parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            lr=self.learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; torch.optim.Adam's has the same form."""
        return {"state": dict(enumerate(self.state.values()))}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over moments and steps."""
        for number, state in enumerate(self.state.values()):
            for name, value in state.items():
                value.copy_(saved["state"][number][name])
