"""Entry point of our model in lmms-eval (`--model clips_mllm`).

A module of its own: lmms-eval reads it while `lmms_eval.models` is being imported, and `model.py` imports that.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="clips_mllm",
    simple_class_path="clips_eval.lmms.model.ClipsMllmSimple",
    chat_class_path="clips_eval.lmms.model.ClipsMllm",
)
