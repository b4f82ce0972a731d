"""The view of an angiogram: its two angles embedded, and features modulated by the embedding.

Shape legend: B batch, C channels, D embedding, F Fourier features of one angle, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ViewEncoder(nn.Module):
    """Embeds the primary and secondary angle of a view; an unknown angle has its own embedding.

    sin(kθ) and cos(kθ) for k = 1 … ``num_frequencies`` go through an MLP. The frequencies are
    whole numbers because angles are periodic: -180° and 180° are one view. Nothing normalises the
    result: a LayerNorm there makes every view's embedding the same once its gain is small, and the
    head then cannot tell one view from another.

    Args:
        embedding_dim: D, length of an embedding.
        hidden_dim: width of the two hidden layers.
        num_frequencies: highest k.
    """

    def __init__(
        self, embedding_dim: int = 256, *, hidden_dim: int = 896, num_frequencies: int = 8
    ) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        num_features = 2 * num_frequencies
        # Known features have a mean square of 1/2; so do these, so that neither kind dominates.
        self.unknown_2F = nn.Parameter(torch.randn(2, num_features) * 0.5**0.5)
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_features, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, embedding_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                # PyTorch's default shrinks the differences between inputs layer by layer, until
                # the biases alone make up the embedding; this gain keeps them.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, angles_B2: Tensor) -> Tensor:
        """Embed views.

        Args:
            angles_B2: float32, degrees, (primary, secondary); NaN where unknown.

        Returns:
            Embeddings (B, D).
        """
        k_F = torch.arange(1, self.num_frequencies + 1, device=angles_B2.device)
        phase_B2F = torch.deg2rad(angles_B2.float())[..., None] * k_F
        known_B2F = torch.cat((phase_B2F.sin(), phase_B2F.cos()), dim=-1)
        # where() with NaN on the branch not taken is safe here: angles carry no gradient.
        features_B2F = torch.where(angles_B2.isnan()[..., None], self.unknown_2F, known_B2F)
        # Eight bits of bfloat16 would round neighbouring views together; this costs nothing.
        with torch.autocast(angles_B2.device.type, enabled=False):
            embedding_BD: Tensor = self.mlp(features_B2F.flatten(1))
        return embedding_BD


class FiLM(nn.Module):
    """Feature-wise linear modulation: x → (1 + γ) x + β (Perez et al. 2018, eq. 2).

    γ and β are linear in a conditioning vector and small at first, so that a head starts out
    near the same head without modulation.

    Args:
        embedding_dim: D, length of the conditioning vector.
        num_channels: C of the features modulated.
    """

    def __init__(self, embedding_dim: int, num_channels: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(embedding_dim, 2 * num_channels)
        nn.init.normal_(self.scale_shift.weight, std=0.1 * embedding_dim**-0.5)
        nn.init.zeros_(self.scale_shift.bias)

    def coefficients(self, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 + γ, β), each float32 (B, C)."""
        # In bfloat16, 1 + γ is a multiple of 1/128: a small γ would be lost.
        with torch.autocast(embedding_BD.device.type, enabled=False):
            gamma_BC, beta_BC = self.scale_shift(embedding_BD.float()).chunk(2, dim=1)
        return 1 + gamma_BC, beta_BC

    def forward(self, feature_BCHW: Tensor, embedding_BD: Tensor) -> Tensor:
        """Modulate features (B, C, H, W) by embeddings (B, D)."""
        return modulated(feature_BCHW, *self.coefficients(embedding_BD))


def modulated(feature_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
    """Return features (B, C, H, W) scaled and shifted by channel."""
    return feature_BCHW * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]
