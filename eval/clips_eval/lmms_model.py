"""The MLLM as an lmms-eval model: `--model clips_mllm`, or a live object for `simple_evaluate`.

    requests --read--> Documents --sort by length--> batches --features once an image--> generate --> answers
                                                                                           (in request order)

Shapes: N documents of a batch, T prompt tokens (left-padded), P tokens an image, D width of the language model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from clips_eval.lmms_batches import Document, batches, cut, expand, generation_options, left_pad, shuffle_images
from clips_eval.lmms_images import FeatureCache, pixel_digest
from vision_tower.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from clips_mllm.checkpoint import Mllm

MANIFEST = ModelManifest(model_id="clips_mllm", chat_class_path="clips_eval.lmms_model.ClipsMllm")

Control = Literal["none", "shuffled"]


class ClipsMllm(lmms):
    """A stock LLaVA checkpoint in lmms-eval's chat mode, batched.

    Args:
        pretrained: folder of the checkpoint; or give a live `mllm`.
        batch_size: documents at a time.
        device, dtype: as `clips_mllm.checkpoint.load_mllm` takes them.
        control: "shuffled" shows every document another document's picture, which tells how much of a score is
            language prior.
        seed: of the control.
        cache_gb: memory for image features.
    Raises:
        UserError: a value that cannot be used, or a checkpoint that cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        mllm: Mllm | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        control: Control = "none",
        seed: int = 0,
        cache_gb: float = 2.0,
    ) -> None:
        super().__init__()
        if control not in get_args(Control):
            raise UserError(f"model_args: control '{control}' is unknown; choose from {', '.join(get_args(Control))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size: '{batch_size}' is not a number of documents; give 1 or more")
        self.mllm = mllm or _load(pretrained, device, dtype)
        if not self.mllm.processor.chat_template:
            raise UserError(
                f"{pretrained}: the processor has no chat template; add the LLM's own as chat_template.jinja"
            )
        self.batch_size = int(batch_size)
        self.control, self.seed = control, seed
        self.features = FeatureCache(int(cache_gb * 2**30))
        self._sources: dict[str, tuple[Instance, int]] = {}  # digest -> where to read the picture again

    @property
    def device(self) -> torch.device:
        """lmms-eval gathers counts of several processes here."""
        return self.mllm.device

    def clean(self) -> None:
        """lmms-eval would delete the modules; this model may be the caller's, in the middle of training."""

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            UserError: a document that cannot be read or shown; the message names it.
        """
        quiet = self.rank != 0
        documents = [self._read(request) for request in tqdm(requests, desc="Reading", unit="doc", disable=quiet)]
        if self.control == "shuffled":
            documents = shuffle_images(documents, self.seed)
        answers: dict[int, str] = {}
        with tqdm(total=len(documents), desc="Answering", unit="doc", disable=quiet) as bar:
            for places in batches(documents, self.batch_size):
                texts = self._answer([documents[place] for place in places])
                answers.update(zip(places, texts, strict=True))
                bar.update(len(places))
        return [answers[place] for place in range(len(documents))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("clips_mllm generates answers; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("clips_mllm answers one round; choose a task with output_type generate_until")

    def _read(self, request: Instance) -> Document:
        _, _, gen_kwargs, doc_id, task, _ = request.args
        place = f"task {task}, document {doc_id}"
        messages, images = self._messages(request, place)
        processor = self.mllm.processor
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # As transformers does: a template that writes <bos> itself must not get a second one.
        bos = processor.tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        ids = processor.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        if ids.count(processor.image_token_id) != len(images):
            raise UserError(
                f"{place}: {ids.count(processor.image_token_id)} '{processor.image_token}' in the prompt but "
                f"{len(images)} images; take the placeholder out of the document's text or mend the chat template"
            )
        digests = [pixel_digest(image) for image in images]
        for index, digest in enumerate(digests):
            self._sources.setdefault(digest, (request, index))
        options = json.dumps(generation_options(gen_kwargs), sort_keys=True)
        return Document(task=task, place=place, ids=ids, images=digests, options=options)

    def _messages(self, request: Instance, place: str) -> tuple[list[dict[str, Any]], list[Image]]:
        """The chat in the processor's form and its pictures, from the task's document."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages: list[dict[str, Any]] = []
        images: list[Image] = []
        try:
            for message in doc_to_messages(self.task_dict[task][split][doc_id]):
                content: list[dict[str, str]] = []
                for part in message["content"]:
                    match part["type"]:
                        case "text":
                            content.append({"type": "text", "text": part["text"]})
                        case "image":
                            content.append({"type": "image"})
                            images.append(_picture(part["url"]))
                        case other:
                            raise UserError(
                                f"{place}: it has {other}, which a LLaVA model cannot take; leave the task out"
                            )
                messages.append({"role": message["role"], "content": content})
        except (OSError, SyntaxError) as error:  # how PIL reports what is no image
            raise UserError(f"{place}: its image cannot be read ({error}); mend the data file") from error
        return messages, images

    def _answer(self, batch: list[Document]) -> list[str]:
        features = self._image_features([digest for document in batch for digest in document.images])
        prompts = [expand(document, features, self.mllm.processor.image_token_id) for document in batch]
        tokenizer = self.mllm.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids, mask = left_pad(prompts, pad)
        options: dict[str, Any] = json.loads(batch[0].options)
        until = options.pop("until")
        if until:
            options.update(stop_strings=until, tokenizer=tokenizer)
        if features:
            shown = [features[digest] for document in batch for digest in document.images]
            options["mm_encoder_outputs"] = {"image": _encoder_output(shown)}
        device = self.mllm.device
        output = self.mllm.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **options
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [cut(text, until) for text in texts]

    def _image_features(self, digests: list[str]) -> dict[str, torch.Tensor]:
        """Projected features of each distinct picture, (P, D) on the model's device; the tower runs for new ones."""
        model, device = self.mllm.model, self.mllm.device
        kept = {digest: self.features.get(digest) for digest in dict.fromkeys(digests)}
        new = [digest for digest, features in kept.items() if features is None]
        found = {digest: features.to(device) for digest, features in kept.items() if features is not None}
        if new:
            pictures = [self._picture_of(digest) for digest in new]
            pixels = self.mllm.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            output = model.get_image_features(pixel_values=pixels.to(device, model.dtype), return_dict=True)
            for digest, features in zip(new, output.pooler_output, strict=True):
                self.features.put(digest, features)
                found[digest] = features
        return found

    def _picture_of(self, digest: str) -> Image:
        request, index = self._sources[digest]
        return self._messages(request, f"task {request.args[4]}, document {request.args[3]}")[1][index]


def _encoder_output(features: list[torch.Tensor]) -> Any:
    """What `LlavaForConditionalGeneration.generate` takes in place of pixels: one (P, D) an image."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    # Annotated as one tensor, but LLaVA itself puts a list there.
    return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]


def _picture(source: Image | str) -> Image:
    from PIL import Image

    picture = Image.open(source) if isinstance(source, str) else source
    return picture.convert("RGB")


def _load(pretrained: str | None, device: str, dtype: str) -> Mllm:
    from clips_mllm.checkpoint import load_mllm

    if pretrained is None:
        raise UserError("model_args: no checkpoint; give pretrained=FOLDER")
    return load_mllm(pretrained, device=device, dtype=dtype)
