"""Vision transformers, and models of images with text."""

from functools import partial

from torch import nn

from architectures.building import IMAGE, TEXT, Architecture, image, image_and_text, of, text


def clip_like(prefix: str) -> Architecture:
    def build() -> nn.Module:
        import transformers

        parts = {"text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": dict(IMAGE)}
        if prefix == "CLIP":
            parts["projection_dim"] = 16
        return getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**parts))

    return Architecture(build, image_and_text)


VISION: dict[str, Architecture] = {
    "ViT": of("ViTForImageClassification", "ViTConfig", image, **IMAGE),
    "DeiT": of("DeiTForImageClassification", "DeiTConfig", image, **IMAGE),
    "BEiT": of("BeitForImageClassification", "BeitConfig", image, use_relative_position_bias=True, **IMAGE),
    "DINOv2": of("Dinov2ForImageClassification", "Dinov2Config", image, mlp_ratio=2, **IMAGE),
    "DINOv2 registers": of(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", image, mlp_ratio=2, **IMAGE
    ),
    "DINOv3": of("DINOv3ViTModel", "DINOv3ViTConfig", image, **IMAGE),
    "ViT-MSN": of("ViTMSNForImageClassification", "ViTMSNConfig", image, **IMAGE),
    "I-JEPA": of("IJepaForImageClassification", "IJepaConfig", image, **IMAGE),
    "ViTDet": of("VitDetModel", "VitDetConfig", image, window_size=2, window_block_indices=[0], **IMAGE),
    "Data2Vec vision": of("Data2VecVisionForImageClassification", "Data2VecVisionConfig", image, **IMAGE),
    "Hiera": of(
        "HieraForImageClassification",
        "HieraConfig",
        partial(image, 64),
        embed_dim=16,
        image_size=[64, 64],
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        mlp_ratio=2.0,
    ),
    "Swin": of(
        "SwinForImageClassification",
        "SwinConfig",
        image,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "SwinV2": of(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "CLIP vision": of("CLIPVisionModelWithProjection", "CLIPVisionConfig", image, projection_dim=16, **IMAGE),
    "CLIP text": of(
        "CLIPTextModelWithProjection", "CLIPTextConfig", text, projection_dim=16, bos_token_id=1, eos_token_id=2, **TEXT
    ),
    "CLIP": clip_like("CLIP"),
    "SigLIP": clip_like("Siglip"),
}
