"""ExPO: model extrapolation, and interpolation with a negative factor (Zheng et al. 2024, arXiv:2404.16792)."""

from __future__ import annotations

from torch import Tensor


def expo(delta: Tensor, alpha: float) -> Tensor:
    """Delta parameters made longer or shorter: (1 + alpha) D, so that E = alpha D.

    The paper's own choice is alpha 0.3 to 0.5 between an aligned model and its SFT checkpoint. The unified view of
    delta parameter editing (arXiv:2410.13841) also takes alpha in [-1, 0), where the edited model lies between base
    (-1) and post-trained model (0).

    Args:
        delta: D = W_post - W_base, any shape, float32.
        alpha: any finite number.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.
    """
    return delta * (1 + alpha)
