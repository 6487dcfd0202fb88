"""The words of the miniature world and the emoji that show them.

A concept is a caption such as "cat" together with the glyphs that may stand for it. Several glyphs are several *poses*
of the same word ("cat" has a whole cat and a cat's face), which captions never tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES: tuple[str, ...] = ("noto", "fluent-emoji", "twemoji")
"""Icon sets, by npm package name: shaded drawings, glossy three-dimensional ones, flat ones."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 60, 55),
    "orange": (245, 150, 45),
    "yellow": (250, 218, 80),
    "green": (95, 175, 85),
    "blue": (70, 130, 215),
    "purple": (145, 95, 190),
    "pink": (245, 165, 195),
    "brown": (145, 100, 70),
    "gray": (150, 150, 155),
    "black": (35, 35, 38),
}


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One word (or two) of the world, the group it belongs to, and the names of its glyphs."""

    word: str
    group: str
    glyphs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The plain caption, with the article English wants."""
        if self.word.endswith("s") and self.word.split()[-1] in _PLURALS:
            return self.word
        return f"{'an' if self.word[0] in 'aeio' or self.word == 'umbrella' else 'a'} {self.word}"


_PLURALS = {"grapes", "cherries", "fries", "scissors", "glasses", "jeans", "blueberries", "socks", "gloves"}

# The 45 animals of DDPO as far as they exist as emoji (all do, some under a neighbour's name).
_ANIMALS = """
cat=cat,cat-face dog=dog,dog-face horse=horse,horse-face monkey=monkey,monkey-face rabbit=rabbit,rabbit-face zebra
spider bird sheep=ewe,ram deer cow=cow,cow-face goat lion tiger=tiger,tiger-face bear raccoon fox wolf lizard
beetle=beetle,lady-beetle ant butterfly fish=fish,tropical-fish shark whale=whale,spouting-whale dolphin
squirrel=chipmunk mouse=mouse,mouse-face rat snake turtle frog chicken=chicken,rooster duck goose bee=honeybee
pig=pig,pig-face turkey fly llama camel=camel,two-hump-camel bat gorilla hedgehog kangaroo
"""
# The model is trained on these too; only the alignment recipes never see them. A cheetah is drawn as a leopard.
_UNSEEN = "snail hippopotamus cheetah=leopard crocodile lobster octopus"
_MORE_ANIMALS = "penguin owl elephant panda koala unicorn=unicorn crab"
_FOOD = """
red_apple=red-apple green_apple=green-apple pear orange=tangerine lemon banana watermelon grapes strawberry cherries
peach pineapple tomato avocado eggplant potato carrot corn=ear-of-corn chili=hot-pepper broccoli mushroom bread
croissant pretzel cheese=cheese-wedge hamburger french_fries=french-fries pizza taco cupcake
birthday_cake=birthday-cake doughnut cookie lollipop ice_cream=soft-ice-cream coconut onion coffee=hot-beverage
beer=beer-mug blueberries
"""
_OBJECTS = """
car=automobile bus bicycle airplane rocket sailboat train tractor house key umbrella balloon gift=wrapped-gift crown
guitar trumpet drum violin bell light_bulb=light-bulb book=open-book scissors pencil hammer clock=alarm-clock
telephone camera television laptop chair bed trophy basketball soccer_ball=soccer-ball sun crescent_moon=crescent-moon
star cloud rainbow fire snowflake snowman cactus tree=deciduous-tree palm_tree=palm-tree tulip rose sunflower
hat=top-hat shirt=t-shirt dress glasses backpack ghost skull robot anchor teddy_bear=teddy-bear gem=gem-stone
"""
_FACES = """
smiling_face=grinning-face crying_face=loudly-crying-face angry_face=pouting-face sleeping_face=sleeping-face
winking_face=winking-face laughing_face=face-with-tears-of-joy love_face=smiling-face-with-heart-eyes
cool_face=smiling-face-with-sunglasses clown=clown-face cowboy=cowboy-hat-face alien jack-o-lantern=jack-o-lantern
"""
_SHAPES = """
red_heart=red-heart orange_heart=orange-heart yellow_heart=yellow-heart green_heart=green-heart blue_heart=blue-heart
purple_heart=purple-heart black_heart=black-heart red_circle=red-circle orange_circle=orange-circle
yellow_circle=yellow-circle green_circle=green-circle blue_circle=blue-circle purple_circle=purple-circle
brown_circle=brown-circle red_square=red-square orange_square=orange-square yellow_square=yellow-square
green_square=green-square blue_square=blue-square purple_square=purple-square brown_square=brown-square
orange_diamond=large-orange-diamond blue_diamond=large-blue-diamond
"""


def _parse(text: str, group: str) -> list[Concept]:
    concepts = []
    for item in text.split():
        word, _, names = item.partition("=")
        glyphs = tuple(names.split(",")) if names else (word,)
        concepts.append(Concept(word=word.replace("_", " ").replace("-", " "), group=group, glyphs=glyphs))
    return concepts


CONCEPTS: tuple[Concept, ...] = tuple(
    _parse(_ANIMALS, "animal")
    + _parse(_UNSEEN, "unseen animal")
    + _parse(_MORE_ANIMALS, "other animal")
    + _parse(_FOOD, "food")
    + _parse(_OBJECTS, "object")
    + _parse(_FACES, "face")
    + _parse(_SHAPES, "shape")
)
