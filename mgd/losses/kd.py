"""Knowledge distillation of logits (Hinton et al., 2015), pixel by pixel."""

from torch import Tensor
from torch.nn import functional


def pixel_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the class distributions, times T^2.

    Args:
        student_logits: `[B, K, H, W]`.
        teacher_logits: `[B, K, H, W]`; no gradient flows into it.
        temperature: T, divides the logits of both.
        valid: `[B, H, W]` bool, pixels whose divergence counts, that of others being 0; left out, all.

    Returns:
        Scalar: sum over classes, mean over pixels.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    divergence = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=1)
    if valid is not None:
        divergence = divergence * valid
    return divergence.mean() * temperature**2
