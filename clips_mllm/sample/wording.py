"""Captions of a scene: noisy web captions, long synthetic captions, and the test split's own wording.

A synthetic caption has several sentences of different content: a summary, one per object, relations, the background,
and remarks that do not describe the image, as machine recaptions have them. Test templates share no sentence pattern
with training templates (tested).
"""

from __future__ import annotations

import random

from clips_mllm.sample.objects import spoken_names
from clips_mllm.sample.scenes import COLUMNS, ROWS, Scene, Thing

SUMMARIES = (
    "The picture shows {all}.",
    "This image has {all}.",
    "There is {all} on a {background} background.",
    "A drawing of {all} on a {background} background.",
    "{All} can be seen here.",
    "An illustration with {all}.",
)
OBJECTS = (
    "{A} is in the {place}.",
    "In the {place} there is {a}.",
    "A {size} {name} sits in the {place}.",
    "The {name} in the {place} is {size}.",
    "{A} appears in the {place} of the picture.",
)
ACROSS = ("The {first} is to the left of the {second}.", "The {second} is to the right of the {first}.")
DOWN = ("The {first} is above the {second}.", "The {second} is below the {first}.")
BACKGROUND_SENTENCES = ("The background is {background}.", "Everything lies on a {background} surface.")
CHATTER = (
    "The style is flat and clean.",
    "Bold black outlines give it a playful mood.",
    "It looks like a sticker for children.",
    "The overall impression is cheerful.",
    "Such pictures are often used in books.",
)
WEB = ("{words}", "{words} clipart", "free {words} vector", "cute {words} sticker", "{words} stock image download")
JUNK = ("IMG_{number}.png", "buy now", "best price 2024", "untitled", "photo {number}", "click to enlarge")

# Used by the test split only.
TEST_CAPTIONS = (
    "You can spot {all} in this drawing.",
    "Against a plain {background} backdrop we find {all}.",
    "{Placed}.",
    "Here someone drew {all}, with {background} behind.",
    "{Count} on {background}: {names}.",
)
_NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = tuple(f"{row} {column}".replace("middle center", "center") for row in ROWS for column in COLUMNS)


def article(name: str) -> str:
    """Return the name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def name_of(thing: Thing) -> str:
    """Return the spoken name of a thing."""
    return spoken_names()[thing.short]


def place_of(thing: Thing) -> str:
    """Return the place: 'top left', 'middle right', 'center'."""
    return PLACES[thing.row * len(COLUMNS) + thing.column]


def join(names: list[str]) -> str:
    """Return 'a', 'a and b' or 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def summary(scene: Scene, rng: random.Random) -> str:
    """Return a sentence that names every object."""
    everything = join([article(name_of(thing)) for thing in scene.things])
    return rng.choice(SUMMARIES).format(all=everything, All=_capital(everything), background=scene.background)


def synthetic_caption(scene: Scene, rng: random.Random) -> str:
    """Return a long caption; each sentence is true for a part of the scene, remarks for every scene."""
    sentences = [_object_sentence(thing, rng) for thing in scene.things]
    sentences += [_relation(a, b, rng) for a, b in zip(scene.things, scene.things[1:], strict=False)]
    sentences.append(rng.choice(BACKGROUND_SENTENCES).format(background=scene.background))
    if rng.random() < 0.5:
        sentences.append(rng.choice(CHATTER))
    rng.shuffle(sentences)
    return " ".join([summary(scene, rng), *sentences])


def _object_sentence(thing: Thing, rng: random.Random) -> str:
    name = name_of(thing)
    words = {"name": name, "a": article(name), "A": _capital(article(name)), "size": thing.size}
    return rng.choice(OBJECTS).format(place=place_of(thing), **words)


def _relation(first: Thing, second: Thing, rng: random.Random) -> str:
    """Return a sentence about two things in row-major order: the first is above, or left in the same row."""
    templates = ACROSS if first.row == second.row else DOWN
    return rng.choice(templates).format(first=name_of(first), second=name_of(second))


def web_caption(scene: Scene, rng: random.Random) -> str:
    """Return noisy alt text: missing objects, wrong objects, junk."""
    names = [name_of(thing) for thing in scene.things if rng.random() > 0.25]
    if rng.random() < 0.1:
        names.append(rng.choice(sorted(spoken_names().values())))
    rng.shuffle(names)
    junk = rng.choice(JUNK).format(number=rng.randint(100, 9999))
    if not names or rng.random() < 0.05:
        return junk
    caption = rng.choice(WEB).format(words=" ".join(names))
    if rng.random() < 0.2:
        caption += f" {scene.background} background"
    return f"{caption} {junk}" if rng.random() < 0.25 else caption


def test_captions(scene: Scene, rng: random.Random) -> list[str]:
    """Return one caption per test template, with objects in random order."""
    things = rng.sample(scene.things, len(scene.things))
    everything = join([article(name_of(thing)) for thing in things])
    placed = join([f"{article(name_of(thing))} at the {place_of(thing)}" for thing in things])
    words = {
        "all": everything,
        "background": scene.background,
        "Placed": _capital(placed),
        "Count": f"{_capital(_NUMBERS[len(things)])} {'thing' if len(things) == 1 else 'things'}",
        "names": ", ".join(name_of(thing) for thing in things),
    }
    return [template.format(**words) for template in TEST_CAPTIONS]
