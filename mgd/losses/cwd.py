"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from einops import rearrange
from torch import Tensor
from torch.nn import functional


def channel_wise(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of each channel's softmax over positions, times T^2 / (K B).

    Args:
        student_logits: `[B, K, H, W]`.
        teacher_logits: `[B, K, H, W]`; no gradient flows into it.
        temperature: T, divides the logits of both.
        valid: `[B, H, W]` bool, positions that are looked at; left out, all.

    Returns:
        Scalar: sum over positions, mean over channels and batch.
    """
    maps = [student_logits, teacher_logits.detach()]
    if valid is not None:  # their share of the softmax is 0; of -inf for both the divergence would be no number
        maps = [logits.float().masked_fill(~valid[:, None], -1e9) for logits in maps]
    student, teacher = (
        functional.log_softmax(rearrange(logits, "b k h w -> (b k) (h w)") / temperature, dim=1) for logits in maps
    )
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
