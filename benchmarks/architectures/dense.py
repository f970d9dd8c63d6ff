"""Segmentation, depth, super-resolution and detection."""

from functools import partial

from torch import nn

from architectures.building import IMAGE, Architecture, image, of, prompt


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=6,
        )
    )


def _depth_anything() -> nn.Module:
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            head_in_channels=16,
            head_hidden_size=8,
        )
    )


def _upernet() -> nn.Module:
    import transformers

    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, num_labels=5
        )
    )


def _sam() -> nn.Module:
    import transformers

    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "output_channels": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16
    }  # fmt: skip
    return transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )


DENSE: dict[str, Architecture] = {
    "SegFormer": of(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        partial(image, 64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    "UperNet": Architecture(_upernet, partial(image, 64)),
    "DPT": of(
        "DPTForDepthEstimation",
        "DPTConfig",
        image,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        **{**IMAGE, "num_hidden_layers": 4},
    ),
    "GLPN": of(
        "GLPNForDepthEstimation",
        "GLPNConfig",
        partial(image, 64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    "Depth Anything": Architecture(_depth_anything, partial(image, 28)),
    "Swin2SR": of(
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        image,
        image_size=32,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=8,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    "YOLOS": of(
        "YolosForObjectDetection", "YolosConfig", image, num_detection_tokens=6, **{**IMAGE, "image_size": [32, 32]}
    ),
    "DETR": Architecture(_detr, partial(image, 64)),
    "SAM": Architecture(_sam, prompt),
}
