"""How both stages optimise: Muon for the matrices of the layers beside AdamW, and what FSDP does with gradients.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) is for small models that start from random weights, and
for the matrices inside the layers; embeddings, heads, norms and biases want AdamW.
"""

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


class MuonWithAdamW(torch.optim.Optimizer):
    """
    `torch.optim.Muon` and `torch.optim.AdamW` behind one interface, so that schedulers, accelerate and checkpoints see
    one optimizer.

    Args:
        named_parameters (`Iterable[tuple[str, nn.Parameter]]`): What is trained; frozen parameters are left out.
        lr (`float`): Of AdamW.
        muon_lr (`float`, defaults to 0.02): Of Muon.
        betas, eps, weight_decay: Of AdamW; Muon shares the weight decay.

    Raises:
        `ImportError`: This torch has no Muon (it came with 2.9).
        `ValueError`: One of the two would have nothing to train.
    """

    def __init__(self, named_parameters, lr, muon_lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"Muon needs torch 2.9 or newer, and this is {torch.__version__}: use AdamW.")
        matrices, others = [], []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                in_layer = parameter.ndim == 2 and ".layers." in name
                (matrices if in_layer else others).append(parameter)
        if not matrices or not others:
            raise ValueError("There is nothing to train in the layers, or nothing outside of them: use AdamW or Muon.")
        self.parts = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        """One table of groups and states: schedulers and checkpoints see this optimizer, the parts do the work."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def configure_sharding(accelerator):
    """
    What accelerate's defaults for FSDP would cost: gradients are shared out after each micro-batch, or every card would
    keep them whole from one to the next; under bfloat16 they are summed up in float32, and inputs, such as timesteps
    and the weights of tokens, are not rounded.

    Args:
        accelerator (`Accelerator`): Of an FSDP2 launch, before anything is prepared.

    Raises:
        `ValueError`: It is of the first version of FSDP.
    """
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("Weights are shared out by FSDP2: pass --fsdp_version 2, or see examples/accelerate_configs.")
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


__all__ = ["MuonWithAdamW", "configure_sharding"]
