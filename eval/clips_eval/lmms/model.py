"""The MLLM as an lmms-eval model: `--model clips_mllm`, or a live object for `simple_evaluate`.

    requests --read--> Documents --sort by length--> batches --features once an image--> generate --> answers
                                                                                           (in request order)

Shapes: N documents of a batch, T prompt tokens (left-padded), P tokens an image, D width of the language model.
"""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any, get_args

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from clips_eval.lmms.batches import Document, batches, cut, expand, generation_options, left_pad, shuffle_images
from clips_eval.lmms.journal import Journal
from clips_eval.lmms.prefix import continued, shared_beginnings
from clips_eval.lmms.requests import Asked, Control, ask_chat, ask_simple, document_of, options_of, place_of, task_names
from clips_mllm.model.image_features import FeatureCache, encoder_output
from clips_mllm.model.processors import IMAGE_INPUTS
from clips_mllm.model.quantize import Quantize
from clips_mllm.prompts.conversation import EMPTY_THOUGHTS
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import image_hash

if TYPE_CHECKING:
    from PIL.Image import Image

    from clips_mllm.model.checkpoint import Mllm

MANIFEST = ModelManifest(
    model_id="clips_mllm",
    simple_class_path="clips_eval.lmms.model.ClipsMllmSimple",
    chat_class_path="clips_eval.lmms.model.ClipsMllm",
)


class ClipsMllm(lmms):
    """A stock LLaVA checkpoint in lmms-eval's chat mode, batched.

    Args:
        pretrained: folder of the checkpoint or a hub id; or give a live `mllm`.
        batch_size: documents at a time.
        device, dtype, quantize: as `clips_mllm.model.checkpoint.load_mllm` takes them.
        control: what is shown in place of a document's images, which tells how much of a score is language prior:
            "shuffled" another document's, "blank" one of the mean colour, "no_image" none.
        seed: of the shuffled control.
        cache_gb: memory for image features.
        journal: where answers are kept as they come, and found again.
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
        quantize: Quantize = "none",
        control: Control = "none",
        seed: int = 0,
        cache_gb: float = 2.0,
        journal: Journal | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (("control", control, get_args(Control)), ("quantize", quantize, get_args(Quantize))):
            if value not in known:
                raise UserError(
                    f"{name} '{value}' is unknown", key="model_args", remedy=f"choose from {', '.join(known)}"
                )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"'{batch_size}' is not a number of documents", key="batch_size", remedy="give 1 or more")
        self.mllm = mllm or _load(pretrained, device, dtype, quantize)
        if not self.mllm.processor.chat_template:
            raise UserError(
                f"{pretrained}: the processor has no chat template", remedy="add the LLM's own as chat_template.jinja"
            )
        self.batch_size = int(batch_size)
        self.control: Control = control
        self.seed = seed
        self.features = FeatureCache(int(cache_gb * 2**30))
        self.journal = journal
        self.images: dict[tuple[str, int], list[str]] = {}  # digests by document, before any exchange
        self._sources: dict[str, tuple[Instance, int]] = {}  # digest -> where to read the image again

    @property
    def device(self) -> torch.device:
        """lmms-eval gathers counts of several processes here."""
        return self.mllm.device

    def clean(self) -> None:
        """lmms-eval would delete the modules; this model may be the caller's, in the middle of training."""

    @torch.no_grad()  # ZeRO-3 could not train on with weights that it gathers in inference mode
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            UserError: a document that cannot be read or shown; the message names it.
        """
        quiet, tasks = self.rank != 0, task_names(requests)
        reading = tqdm(requests, desc=f"{tasks}: reading", unit="doc", disable=quiet)
        documents = [self._read(request) for request in reading]
        if self.control == "shuffled":
            documents = self._shuffled(documents, requests)
        answers = self._kept(documents)
        missing = [place for place in range(len(documents)) if place not in answers]
        told = {"desc": f"{tasks}: answering", "unit": "doc", "disable": quiet}
        with tqdm(total=len(documents), initial=len(answers), **told) as bar:
            for some in batches([documents[place] for place in missing], self.batch_size):
                places = [missing[one] for one in some]
                texts = self._answer([documents[place] for place in places])
                answers.update(zip(places, texts, strict=True))
                if self.journal is not None:
                    self.journal.add({documents[place].key: answers[place] for place in places})
                bar.update(len(places))
        return [answers[place] for place in range(len(documents))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("clips_mllm generates answers; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("clips_mllm answers one round; choose a task with output_type generate_until")

    def _kept(self, documents: list[Document]) -> dict[int, str]:
        """Answers of an earlier run, by place."""
        if self.journal is None:
            return {}
        found = {place: self.journal.get(document.key) for place, document in enumerate(documents)}
        return {place: answer for place, answer in found.items() if answer is not None}

    def _ask(self, request: Instance) -> Asked:
        """The prompt and the images of a request, under the control."""
        document = document_of(request, self.task_dict)
        ask = ask_simple if self.is_simple else ask_chat
        return ask(request, document, self.mllm.processor, self.control)

    def _read(self, request: Instance) -> Document:
        _, _, _, doc_id, task, _ = request.args
        place = place_of(request)
        asked = self._ask(request)
        processor = self.mllm.processor
        # As transformers does: a template that writes <bos> itself must not get a second one.
        bos = processor.tokenizer.bos_token
        special = bos is None or not asked.prompt.startswith(bos)
        ids = processor.tokenizer(asked.prompt, add_special_tokens=special)["input_ids"]
        if ids.count(processor.image_token_id) != len(asked.images):
            raise UserError(
                f"{ids.count(processor.image_token_id)} '{processor.image_token}' in the prompt but "
                f"{len(asked.images)} images",
                file=place,
                remedy="take the placeholder out of the document's text or mend the chat template",
            )
        digests = [image_hash(image) for image in asked.images]
        self.images[task, doc_id] = digests
        for index, digest in enumerate(digests):
            self._sources.setdefault(digest, (request, index))
        options = json.dumps(generation_options(options_of(request, simple=self.is_simple)), sort_keys=True)
        return Document(task=task, doc_id=doc_id, ids=ids, images=digests, options=options)

    def _shuffled(self, documents: list[Document], requests: list[Instance]) -> list[Document]:
        """Images exchanged within each task, over the documents of all processes."""
        if self.world_size == 1:
            return shuffle_images(documents, self.seed)
        own = {digest: (request.args[3], index) for digest, (request, index) in self._sources.items()}
        shares: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(shares, (documents, own))
        one_of = {request.args[4]: request for request in requests}
        for others, places in shares:
            for document in others:
                for digest in document.images:
                    doc_id, index = places[digest]
                    self._sources.setdefault(digest, (_about(one_of[document.task], doc_id), index))
        everywhere = [document for others, _ in shares for document in others]
        start = sum(len(others) for others, _ in shares[: self.rank])
        return shuffle_images(everywhere, self.seed)[start : start + len(documents)]

    def _answer(self, batch: list[Document]) -> list[str]:
        features = self._image_features([digest for document in batch for digest in document.images])
        prompts = [expand(document, features, self.mllm.processor.image_token_id) for document in batch]
        tokenizer = self.mllm.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options: dict[str, Any] = json.loads(batch[0].options)
        until = options.pop("until")
        if until:
            options.update(stop_strings=until, tokenizer=tokenizer)
        model = self.mllm.model
        shared = shared_beginnings(batch, prompts, self.mllm.processor.image_token_id, options)
        if shared is not None:
            shown = [features[digest] for place in shared.first for digest in batch[place].images]
            inputs = continued(model, prompts, shared, encoder_output(shown), pad)
        else:
            ids, mask = left_pad(prompts, pad)
            inputs = {"input_ids": ids.to(self.mllm.device), "attention_mask": mask.to(self.mllm.device)}
            if features:
                shown = [features[digest] for document in batch for digest in document.images]
                inputs["mm_encoder_outputs"] = {"image": encoder_output(shown)}
        output = model.generate(**inputs, pad_token_id=pad, **options)
        width = inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [cut(text.removeprefix(EMPTY_THOUGHTS), until) for text in texts]

    def _image_features(self, digests: list[str]) -> dict[str, torch.Tensor]:
        """Return projected features of each distinct image, (P, D) on the model's device."""
        return self.features.get_or_encode(digests, self._encode, self.mllm.device)

    def _encode(self, digests: list[str]) -> list[torch.Tensor]:
        model, images = self.mllm.model, [self._image_of(digest) for digest in digests]
        processed = self.mllm.processor.image_processor(images, return_tensors="pt")
        inputs = {name: processed[name].to(self.mllm.device) for name in IMAGE_INPUTS if name in processed}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return list(model.get_image_features(**inputs, return_dict=True).pooler_output)

    def _image_of(self, digest: str) -> Image:
        request, index = self._sources[digest]
        return self._ask(request).images[index]


class ClipsMllmSimple(ClipsMllm):
    """The same in lmms-eval's simple mode, for tasks that have no other and for comparisons with stock models."""

    is_simple = True


def _about(request: Instance, doc_id: int) -> Instance:
    """The same request about another document: another process read it, and this one must find its image."""
    other = copy.copy(request)
    arguments = list(request.args)
    arguments[3] = doc_id
    other.arguments = tuple(arguments)
    return other


def _load(pretrained: str | None, device: str, dtype: str, quantize: Quantize) -> Mllm:
    if pretrained is None:
        raise UserError("no checkpoint", key="model_args", remedy="give pretrained=FOLDER")
    return load_own(pretrained, device=device, dtype=dtype, quantize=quantize)


def load_own(checkpoint: str, *, device: str, dtype: str, quantize: Quantize) -> Mllm:
    """For our engine, under this command and under lmms-eval's own.

    Args:
        device, dtype, quantize: as `clips_mllm.model.checkpoint.load_mllm` takes them; auto is this process's own GPU.
    Raises:
        UserError: a checkpoint that cannot be loaded.
    """
    from clips_mllm.model.checkpoint import load_mllm

    return load_mllm(checkpoint, device=own_device(device), dtype=dtype, quantize=quantize)


def own_device(device: str) -> str:
    """Under `accelerate launch` each process takes its own GPU (untested on GPUs)."""
    import torch

    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
