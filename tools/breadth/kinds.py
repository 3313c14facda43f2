"""Which model types transformers has, and by which class each is tried."""

from __future__ import annotations

from typing import Any

# The first of these auto-mappings that names a class decides: what a model is published for, before its headless body.
MAPPINGS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM",
    "CTC", "RNNT", "TDT", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION", "DEPTH_ESTIMATION", "MASK_GENERATION",
    "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "IMAGE_TO_IMAGE", "IMAGE_MATTING",
    "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "TIME_SERIES_PREDICTION", "MASKED_IMAGE_MODELING",
    "CAUSAL_IMAGE_MODELING", "VISUAL_QUESTION_ANSWERING", "TABLE_RECOGNITION", "TEXT_RECOGNITION", "RETRIEVAL",
    "DECISION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION", "PRETRAINING",
    "TEXT_ENCODING",
)  # fmt: skip
# Of types whose first mapping is not what they are known for: the mapping that is.
KNOWN_FOR = {
    "reformer": "CAUSAL_LM", "fuyu": "IMAGE_TEXT_TO_TEXT", "musicgen": "TEXT_TO_WAVEFORM",
    "musicgen_melody": "TEXT_TO_WAVEFORM", "shieldgemma2": "IMAGE_CLASSIFICATION",
}  # fmt: skip


def model_types() -> list[str]:
    """All that have a config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def config_class(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


def main_class(kind: str) -> Any:
    """The class by which ``kind`` is tried, or None where transformers has no model of it."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = [f"MODEL_FOR_{m}_MAPPING_NAMES" for m in MAPPINGS] + ["MODEL_MAPPING_NAMES"]
    if kind in KNOWN_FOR:
        names.insert(0, f"MODEL_FOR_{KNOWN_FOR[kind]}_MAPPING_NAMES")
    for name in names:
        found = getattr(modeling_auto, name, {}).get(kind)
        for each in (found,) if isinstance(found, str) else found or ():
            if (own := getattr(transformers, each, None)) is not None:
                return own
    return None
