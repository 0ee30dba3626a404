"""From the configuration of a run to its network."""

from __future__ import annotations

from training.config import MimRunConfig, TokenizerModelConfig
from training.linear_start import start_linear
from training.mim import MaskedImageModel, MIMConfig
from training.tokenizer import NORM_GROUPS, Tokenizer, TokenizerConfig
from training.vit import ViTConfig


def build_tokenizer(model: TokenizerModelConfig) -> Tokenizer:
    """A new tokenizer of the configured size."""
    tokenizer = Tokenizer(
        TokenizerConfig(
            quantizer=model.quantizer,
            codebook_size=model.codebook_size,
            embedding_dim=model.embedding_dim,
            feature_channels=model.channels[-1],
            encoder_channels=model.channels,
            decoder_channels=model.channels[::-1],
            depth_merge=model.depth_merge,
        )
    )
    if model.initial == "linear":
        start_linear(tokenizer, NORM_GROUPS)
    return tokenizer


def vit_config(config: MimRunConfig) -> ViTConfig:
    """The ViT of the configured size."""
    model, tokens = config.model, config.data
    return ViTConfig(
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        position_grid=(tokens.tokens_z, tokens.tokens_x, tokens.tokens_x),
        drop_path=model.drop_path,
        checkpoint_blocks=model.recompute_blocks,
    )


def masked_blocks(config: MimRunConfig) -> tuple[int, ...]:
    """The blocks that see mask tokens."""
    return tuple(range(config.model.mask_from_block, config.model.depth))


def build_mim(config: MimRunConfig, codebook_size: int) -> MaskedImageModel:
    """A new model of the configured size, with a head for `codebook_size` codes."""
    return MaskedImageModel(
        MIMConfig(
            vit=vit_config(config),
            codebook_size=codebook_size,
            mask_ratio=config.model.mask_ratio,
            mask_layer_ids=masked_blocks(config),
        )
    )
