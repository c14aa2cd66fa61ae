"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from einops import rearrange
from torch import Tensor
from torch.nn import functional


def channel_wise(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) of each channel's softmax over positions, times T^2 / (K B).

    Args:
        student_logits: `[B, K, H, W]`.
        teacher_logits: `[B, K, H, W]`; no gradient flows into it.
        temperature: T, divides the logits of both.

    Returns:
        Scalar: sum over positions, mean over channels and batch.
    """
    student, teacher = (
        functional.log_softmax(rearrange(logits, "b k h w -> (b k) (h w)") / temperature, dim=1)
        for logits in (student_logits, teacher_logits.detach())
    )
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
