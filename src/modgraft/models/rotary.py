"""Rotary positions in one dimension, and in two: along a picture's axes, or around its middle."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(kind: str, width: int, theta: float = 10000.0) -> Tensor:
    """ω_i = theta^(−i/m), i < m: float32 ``[m]``.

    Args:
        kind: ``"rotary"``, where m is half of ``width``, or ``"axial"`` or ``"polar"``, a quarter.
        width: the number of a head's features.
        theta: the base.

    Raises:
        ValueError: for a width that cannot be divided so.
    """
    parts = 2 if kind == "rotary" else 4
    if width % parts:
        raise ValueError(f"{kind} positions: a head of {width} features is no multiple of {parts}")
    return theta ** -(torch.arange(width // parts) / (width // parts))


def angles(
    kind: str, positions: Tensor, omega: Tensor, grid: tuple[int, int] | None = None
) -> Tensor:
    """ω p (rotary);  ω (row, column) (axial);  (ω ρ, k φ) (polar).

    The angles by which positions turn the pairs of a head's features: all pairs with the position
    p, or one half of them with each of two coordinates of it, so that a score depends on the
    differences in both. In polar coordinates around the middle of the grid φ turns by whole numbers
    k = 1, 2, …, so that what lies on both sides of φ = π is near.

    Args:
        kind: ``"rotary"``, ``"axial"`` or ``"polar"``.
        positions: int64 ``[…, n]``, of tokens in raster order: ``row * columns + column``.
        omega: the :func:`frequencies`.
        grid: rows and columns; needed in two dimensions.

    Returns:
        Float32 ``[…, n, width/2]``.

    Raises:
        ValueError: for two dimensions without a grid.

    Rotary positions are Su et al. 2021 (arXiv:2104.09864); axial ones in vision transformers Heo et
    al. 2024 (arXiv:2403.13298).
    """
    if kind == "rotary":
        return positions[..., None] * omega
    if grid is None:
        raise ValueError(f"{kind} positions: give the grid, (rows, columns), that tokens fill")
    row, column = positions // grid[1], positions % grid[1]
    if kind == "axial":
        return torch.cat([row[..., None] * omega, column[..., None] * omega], -1)
    y, x = row - (grid[0] - 1) / 2, column - (grid[1] - 1) / 2
    rho, phi = torch.hypot(y, x), torch.atan2(y, x)
    whole = torch.arange(1, len(omega) + 1, device=omega.device)
    return torch.cat([rho[..., None] * omega, phi[..., None] * whole], -1)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(x₁ cos − x₂ sin, x₂ cos + x₁ sin), where x₁ and x₂ are the halves of a head's features.

    Args:
        x: ``[B, h, n, d]``.
        turn: cosine and sine of the angles, each ``[B or 1, 1, n, d/2]``.
    """
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
