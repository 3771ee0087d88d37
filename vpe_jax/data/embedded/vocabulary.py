"""Vocabulary of the embedded data sets: emoji of scenes, and written words.

The emoji are familiar and distinguishable at 64 x 64 pixels.
"""

from __future__ import annotations

import functools

from vpe_jax.data.embedded import shapes

# Noun -> code of its drawing (vpe_jax.data.embedded.drawings).
_ANIMALS = """
dog 1F415, cat 1F408, horse 1F40E, cow 1F404, pig 1F416, sheep 1F411, elephant 1F418, lion 1F981,
tiger 1F405, bear 1F43B, panda 1F43C, koala 1F428, fox 1F98A, wolf 1F43A, rabbit 1F407,
mouse 1F401, monkey 1F412, gorilla 1F98D, giraffe 1F992, zebra 1F993, deer 1F98C, camel 1F42A,
hedgehog 1F994, bat 1F987, chicken 1F414, duck 1F986, owl 1F989, penguin 1F427, parrot 1F99C,
flamingo 1F9A9, swan 1F9A2, frog 1F438, turtle 1F422, snake 1F40D, crocodile 1F40A, whale 1F433,
dolphin 1F42C, fish 1F41F, octopus 1F419, crab 1F980, shark 1F988, snail 1F40C, butterfly 1F98B,
bee 1F41D, ladybug 1F41E, spider 1F577
"""
_PLANTS_AND_FOOD = """
tree 1F333, palm tree 1F334, cactus 1F335, rose 1F339, sunflower 1F33B, tulip 1F337,
mushroom 1F344, apple 1F34E, banana 1F34C, tangerine 1F34A, lemon 1F34B, pear 1F350, peach 1F351,
strawberry 1F353, watermelon 1F349, pineapple 1F34D, tomato 1F345, carrot 1F955, avocado 1F951,
eggplant 1F346, pizza 1F355, hamburger 1F354, taco 1F32E, cake 1F382, cupcake 1F9C1, donut 1F369,
cookie 1F36A, lollipop 1F36D
"""
_VEHICLES_AND_PLACES = """
car 1F697, bus 1F68C, tractor 1F69C, bicycle 1F6B2, train 1F682, airplane 2708,
helicopter 1F681, rocket 1F680, sailboat 26F5, house 1F3E0, castle 1F3F0, tent 26FA, sun 2600,
cloud 2601, rainbow 1F308, volcano 1F30B
"""
_THINGS = """
umbrella 2602, key 1F511, light bulb 1F4A1, alarm clock 23F0, book 1F4D5, pencil 270F, hammer 1F528,
guitar 1F3B8, violin 1F3BB, drum 1F941, trumpet 1F3BA, bell 1F514, balloon 1F388, gift 1F381,
crown 1F451, top hat 1F3A9, camera 1F4F7, television 1F4FA, chair 1FA91, soccer ball 26BD,
basketball 1F3C0, trophy 1F3C6, kite 1FA81, teddy bear 1F9F8, robot 1F916, ghost 1F47B,
snowman 26C4, bomb 1F4A3, anchor 2693, candle 1F56F
"""

# Words of signs, in addition to the names of objects, shapes and colours.
_SIGNS = """
open closed exit enter stop go sale free hello welcome thanks please happy love music coffee tea
water bread milk school market hotel garden north south east west summer winter monday friday news
"""
# Further words, so that unseen words can be spelled from seen ones: letters in many positions.
_COMMON = """
abacus aerial aid alarm alembic alien amount amphora amulet angel anger angry ant antenna anxious
arm arrival artist arts atom auto away axe baby back bacon badge badger bag bagel baggage balance
ball ballet ballot bandage banjo bank bar barber bargain basket bath bathtub battery beach beads
beans beard beaver bed beetle behind bellhop bento biceps big bin bird bison blond blossom board
boat bolt bone books boot bottle bouquet bowl box boy brain brick bridge bright broken broom
bubble bucket buffalo bug bulb bullet bunny buoy burrito butter button cabinet call candy cane
canoe cap card cart chain charge chart check cheese cherry chess chest chick child chime church
cinema circus claim clamp clapper clock closet clothes clouds clover clown club clutch coaster
coat coconut coin comet compass control cook coral cork corn couch couple cover cowboy cracker
crayon cream credit cricket crutch crystal cup curl curly curry custard customs cut cyclone dancer
dango deaf desert desktop disc dish disk divide dizzy dodo dollar dolls done donkey door double
dove dragon dress droplet eagle ear egg eleven elf emblem empty engine entry equals euro eye
eyebrow face factory fairy falafel family fan farmer fast fax fear feather female ferris ferry
field fight file film finger fire first fist flag flash flat floor floppy flower flute fly fog
foggy folder fondue food foot fork fortune forward frames french fries from front fruit full game
garlic gear gem genie ginger girl glass glasses globe glove goal goat goblin goose grade grapes
grey ground guard hair haircut hairy halo hamster hand handbag handle harp hat head health hear
hearts heavy helmet herb high hockey hole hollow honey hook horn houses ice input island jack jar
jeans joker joy judge keycap kimono kiss kitchen kiwi knobs knot lab label ladder lady lamp
lantern laptop large last leaf leafy ledger left leg leopard letter level light lime line link
liquid litter lizard llama lobster long loop lorry lotion lotus loudly luggage lungs machine magic
magnet mail mailbox mammoth mango manual map maple maracas mask meat medal medical medium melon
memo menorah mermaid merman metro microbe middle milky minibus minus mirror mobile money monster
monthly moon moose mosque motor mount mouth movie mug musical nail name necktie needle nerd nest
net neutral new next nib night ninja nose notepad notes numbers nut office officer older olive
onion optical otter package palette palm paper park pause peace peacock peanuts pen pepper phoenix
phone pick pickup picture pie piece pilot pin pine place planet plant plate play plug plunger
points polar pole police polish polo poodle pool popcorn popper post postal postbox potable potato
pound pretzel prince printer prints pushpin puzzle quarter raccoon radio railway rain ray razor
receipt record repeat ribbon rice right rock roll roller rooster root rosette round rugby ruler
sad safety salad salt salute saucer scale scarf scooter score scroll seal secret see service
shallow shell shield ship shirt shoe shorts shovel shower shrimp singer single skate sled sleepy
slide slider small smile soap soccer socks spade sparkle speak speaker speech spiral sponge spoon
sport springs squid stadium stars station steam stone store student studio sunrise sunset sushi
sweat sweet swirl swords taxi teacher teacup teapot tears teddy temple tennis thirty thread thumbs
ticket timer tongue toolbox tooth top tornado tower track trade traffic tram tramway tray truck
turkey twelve unicorn uniform vehicle victory video viewer voltage volume waffle watch wave way
weights white wind window worker world worm wrench yarn zipper
"""
_MAX_LENGTH = 8  # letters of a written word; longer words would be too small to read

_IRREGULAR = {
  'mouse': 'mice',
  'sheep': 'sheep',
  'fish': 'fish',
  'deer': 'deer',
  'wolf': 'wolves',
  'fox': 'foxes',
  'octopus': 'octopuses',
  'butterfly': 'butterflies',
  'cactus': 'cactuses',
  'peach': 'peaches',
  'strawberry': 'strawberries',
  'tomato': 'tomatoes',
  'bus': 'buses',
  'cross': 'crosses',
}


@functools.cache
def emoji_codes() -> dict[str, str]:
  """Noun -> code, in a fixed order."""
  listed = ','.join((_ANIMALS, _PLANTS_AND_FOOD, _VEHICLES_AND_PLACES, _THINGS))
  return dict(_entry(entry) for entry in listed.split(','))


@functools.cache
def written() -> tuple[str, ...]:
  """The written words, in a fixed order."""
  words = (*_SIGNS.split(), *emoji_codes(), *shapes.SHAPES, *shapes.COLOURS, *_COMMON.split())
  fits = lambda word: word.isalpha() and 2 <= len(word) <= _MAX_LENGTH
  return tuple(dict.fromkeys(word for word in words if fits(word)))


def plural(noun: str) -> str:
  """The plural of a noun of the vocabulary, or of a shape."""
  return _IRREGULAR.get(noun, f'{noun}s')


def _entry(text: str) -> tuple[str, str]:
  name, code = text.strip().rsplit(' ', 1)
  return name, code
