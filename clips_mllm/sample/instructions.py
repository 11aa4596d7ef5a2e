"""LLaVA JSON of the sample world: stage-1 captions; stage-2 conversations over scenes, easy-VQA and plain text."""

from __future__ import annotations

import random
from typing import Any

from clips_mllm.sample.objects import THEMES, spoken_names, theme_of
from clips_mllm.sample.scenes import BACKGROUNDS, GRID, Scene
from clips_mllm.sample.shapes import ShapeImage, is_open
from clips_mllm.sample.wording import PLACES, article, name_of, place_of, summary

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MAX_ABSENT = 3  # yes/no questions per image about absent shapes and colors
SCENE_ROUNDS = ("presence", "located", "short", "letters", "describe")
SCENE_SHARES = (6, 3, 3, 1, 2)
PATCHES = 2  # patches of 16 pixels along a side of a cell
PLACES_IN_CELL = tuple((y, x) for y in range(PATCHES) for x in range(PATCHES))
Turn = tuple[str, str]

STAGE1_PROMPTS = ("Describe the image concisely.", "Provide a brief description of the given image.")
DESCRIBE_PROMPTS = ("Describe this image.", "What is in the picture?", "Tell me what you see.")


def conversation(identity: str, turns: list[Turn], images: list[str]) -> dict[str, Any]:
    """Return a LLaVA row. The first turn begins with the placeholders; `image` is a path, a list, or absent."""
    first, *rest = turns
    opened = [("<image>\n" * len(images) + first[0], first[1]), *rest]
    row: dict[str, Any] = {"id": identity}
    if images:
        row["image"] = images[0] if len(images) == 1 else images
    row["conversations"] = [
        {"from": speaker, "value": value}
        for question, answer in opened
        for speaker, value in (("human", question), ("gpt", answer))
    ]
    return row


def caption_row(scene: Scene, image: str, rng: random.Random) -> dict[str, Any]:
    """Return a stage-1 row: a description in one sentence."""
    return conversation(scene.key, [(rng.choice(STAGE1_PROMPTS), summary(scene, rng))], [image])


def shape_row(shape: ShapeImage, image: str, rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row: some of easy-VQA's questions about an image, as one conversation."""
    return conversation(f"easy-vqa-{shape.image_id}", _shape_turns(shape, rng), [image])


def patch_text_shape_row(shape: ShapeImage, rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row as `shape_row`, with one word per patch instead of the image.

    Color and shape must be known. The position is random, because easy-VQA does not ask for it.
    """
    side = GRID * PATCHES
    words = ["white"] * side**2
    size = rng.randint(2, 3)
    top, left = rng.randint(0, side - size), rng.randint(0, side - size)
    places = [(top + y) * side + left + x for y in range(size) for x in range(size)]
    rng.shuffle(places)
    for number, place in enumerate(places):
        words[place] = str((shape.color, shape.shape)[number % 2])
    return _patch_text_conversation(f"told-easy-vqa-{shape.image_id}", words, _shape_turns(shape, rng))


def _shape_turns(shape: ShapeImage, rng: random.Random) -> list[Turn]:
    """Return all questions about what is in the image, and at most three about absent shapes and colors.

    In easy-VQA the latter are three of four yes/no questions, so that answering "no" would score without looking.
    """
    present = [pair for pair in shape.questions if is_open(pair[1]) or asks_for_present(*pair)]
    absent = [pair for pair in shape.questions if pair not in present]
    kept = present + rng.sample(absent, min(MAX_ABSENT, len(absent)))
    rng.shuffle(kept)
    return short_answers(kept)


def _patch_text_conversation(identity: str, words: list[str], turns: list[Turn]) -> dict[str, Any]:
    (question, answer), *rest = turns
    return conversation(identity, [(f"{' '.join(words)}\n{question}", answer), *rest], [])


def asks_for_present(question: str, answer: str) -> bool:
    """Return True if a yes/no question names a shape or color that the image has ("not" inverts the answer)."""
    return (answer == "yes") != ("not" in question.split())


def short_answers(pairs: list[Turn]) -> list[Turn]:
    """Add the request for a short answer to the first question, as in LLaVA's VQA conversations."""
    (question, answer), *rest = pairs
    return [(question + SHORT, answer), *rest]


def scene_row(scene: Scene, image: str, rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row about a scene: a description, choices by letter, or a round of questions."""
    return conversation(scene.key, _scene_turns(scene, rng), [image])


def patch_text_row(scene: Scene, rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row as `scene_row`, with one word per patch instead of the image.

    A small LLM cannot detect if a name is in a list. It learns this from words in a few dozen steps, and applies it to
    images if image tokens resemble words (clips_mllm/sample/projector.py).
    """
    return _patch_text_conversation(f"told-{scene.key}", patch_words(scene, rng), _scene_turns(scene, rng))


def patch_words(scene: Scene, rng: random.Random) -> list[str]:
    """Return one word per 16-pixel patch in row-major order, with the errors of a projector.

    Background patches have the background's color. At least one patch of a thing has a word of its name; the others
    have such a word, a word of a random name, or the background's color.
    """
    side = GRID * PATCHES
    words = [scene.background] * side**2
    names = list(spoken_names().values())
    for thing in scene.things:
        places = [(thing.row * PATCHES + y) * side + thing.column * PATCHES + x for y, x in PLACES_IN_CELL]
        named = rng.choice(places)
        for place in places:
            if place == named or rng.random() < 0.5:
                words[place] = rng.choice(name_of(thing).split())
            elif rng.random() < 0.3:
                words[place] = rng.choice(rng.choice(names).split())
    return words


def _scene_turns(scene: Scene, rng: random.Random) -> list[Turn]:
    match rng.choices(SCENE_ROUNDS, SCENE_SHARES)[0]:
        case "presence":
            return short_answers(_presence_round(scene, rng))
        case "located":
            return _located_round(scene, rng)
        case "short":
            return short_answers(_short_round(scene, rng))
        case "letters":
            return [choice_turn(make_choice(scene, rng), rng) for _ in range(3)]
        case _:
            return [(rng.choice(DESCRIBE_PROMPTS), summary(scene, rng))]


def _presence_round(scene: Scene, rng: random.Random) -> list[Turn]:
    """Ask for every object and as many absent ones. No other questions: their answers would reveal these."""
    turns = [(presence_question(name_of(thing)), "yes") for thing in scene.things]
    turns += [(presence_question(name), "no") for name in absent_names(scene, len(scene.things), rng)]
    rng.shuffle(turns)
    return turns


def _located_round(scene: Scene, rng: random.Random) -> list[Turn]:
    """Ask the same, answered with the position, which teaches more than yes or no."""
    turns = [(presence_question(name_of(thing)), f"Yes, in the {place_of(thing)}.") for thing in scene.things]
    turns += [(presence_question(name), "No.") for name in absent_names(scene, len(scene.things), rng)]
    rng.shuffle(turns)
    return turns


def _short_round(scene: Scene, rng: random.Random) -> list[Turn]:
    """Ask for objects by place, a place, and the count or background, with answers of a few tokens."""
    turns = [(f"What is in the {place_of(thing)}?", name_of(thing)) for thing in scene.things]
    turns += [_place_turn(scene, rng), rng.choice((_count_turn, _background_turn))(scene, rng)]
    rng.shuffle(turns)
    return turns


def presence_question(name: str) -> str:
    """Return the question in POPE's wording."""
    return f"Is there {article(name)} in the image?"


def absent_names(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Draw objects that are not in the scene, half of them from the scene's themes."""
    present = {thing.short for thing in scene.things}
    related = [short for thing in scene.things for short in THEMES[theme_of(thing.short)] if short not in present]
    others = [short for short in spoken_names() if short not in present]
    chosen: list[str] = []
    while len(chosen) < count:
        short = rng.choice(related if rng.random() < 0.5 else others)
        if short not in chosen:
            chosen.append(short)
    return [spoken_names()[short] for short in chosen]


def _place_turn(scene: Scene, rng: random.Random) -> Turn:
    thing = rng.choice(scene.things)
    return f"Where is the {name_of(thing)}?", place_of(thing)


def _count_turn(scene: Scene, rng: random.Random) -> Turn:
    return "How many objects are in the image?", str(len(scene.things))


def _background_turn(scene: Scene, rng: random.Random) -> Turn:
    return "What color is the background?", scene.background


Choice = tuple[str, str, str, list[str]]  # category, question, right answer, wrong answers


def make_choice(scene: Scene, rng: random.Random) -> Choice:
    """Draw a question with one right and three wrong answers."""
    thing = rng.choice(scene.things)
    match rng.choice(("object", "place", "background")):
        case "object":
            wrong = absent_names(scene, 3, rng)
            return "object", "Which of these is in the image?", name_of(thing), wrong
        case "place":
            here = {place_of(other) for other in scene.things}
            wrong = rng.sample([place for place in PLACES if place not in here], 3)
            return "place", f"Where is the {name_of(thing)}?", place_of(thing), wrong
        case _:
            wrong = rng.sample([color for color in sorted(BACKGROUNDS) if color != scene.background], 3)
            return "background", "What color is the background?", scene.background, wrong


def choice_options(choice: Choice, rng: random.Random) -> tuple[list[str], str]:
    """Return the options in random order, and the letter of the right one."""
    options = [choice[2], *choice[3]]
    rng.shuffle(options)
    return options, "ABCD"[options.index(choice[2])]


def choice_turn(choice: Choice, rng: random.Random) -> Turn:
    """Return a multiple-choice question in LLaVA's wording, and its answer."""
    options, letter = choice_options(choice, rng)
    listed = "\n".join(f"{name}. {option}" for name, option in zip("ABCD", options, strict=True))
    return f"{choice[1]}\n{listed}{LETTER}", letter


def pair_row(first: Scene, second: Scene, images: list[str], rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row about two images: which one shows an object? Empty if they show the same."""
    scenes = (first, second)
    turns: list[Turn] = []
    for index in rng.sample((0, 1), 2):
        here = {thing.short for thing in scenes[1 - index].things}
        thing = next((thing for thing in scenes[index].things if thing.short not in here), None)
        if thing is not None:
            turns.append((f"Which image shows {article(name_of(thing))}?", ("first", "second")[index]))
    return conversation(f"{first.key}+{second.key}", short_answers(turns), images) if turns else {}


def text_row(index: int, rng: random.Random) -> dict[str, Any]:
    """Return a stage-2 row without image: arithmetic and categories of things."""
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            turns.append((f"What is {a} plus {b}?", str(a + b)))
        else:
            short = rng.choice(list(spoken_names()))
            theme = rng.choice((theme_of(short), rng.choice(sorted(THEMES))))
            answer = "yes" if theme == theme_of(short) else "no"
            turns.append((f"Does {article(spoken_names()[short])} belong to '{theme}'?", answer))
    return conversation(f"text-{index:06d}", short_answers(turns), [])
