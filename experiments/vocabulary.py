"""Wishes in wider English for SmolLM2's LoRA: the world's facts by other names, comparisons and descriptions.

What it learns here is to answer any such word with what it knows of it. `knowledge.jsonl` has none of these words but
the commonest (tests/test_smollm2.py).
"""

import numpy as np

from miniature.facts import Picture, pick, sample_picture
from miniature.wishes import typed


def phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.replace("\n", " ").split("|")]


KINDS = {  # without an article: names | descriptions, which begin with "what", "it", or a noun with its own article
    "ball": phrases("""football | basketball | volleyball | sphere | globe | tennis ball | baseball | beach ball
        | marble | bowling ball | *what children throw and catch | *something round to play with
        | *a round toy that rolls
        | *what two football teams fight for"""),
    "house": phrases("""villa | bungalow | hut | castle | farmhouse | manor | lodge | townhouse | hovel | country estate
        | *where a family lives | *a building with a door and windows | *what a bricklayer builds | *a home"""),
    "tree": phrases("""birch | willow | beech | cedar | palm tree | fir | olive tree | apple tree | chestnut
        | redwood | baobab | larch | yew | hazel | *what a squirrel climbs | *it has leaves, bark and roots
        | *a woody thing in which birds nest | *what a lumberjack cuts down"""),
    "boat": phrases("""canoe | dinghy | raft | ferry | steamer | barge | tugboat | galleon | warship | lifeboat
        | rowboat | clipper | sloop | ketch | cutter | *what a sailor steers | *it floats and has a mast
        | *something that a captain commands"""),
    "fish": phrases("""tuna | carp | pike | haddock | anchovy | piranha | guppy | sole | flounder | swordfish | bream
        | eel | perch | *an animal that lives under water and has scales | *what an angler hopes for
        | *it swims in an aquarium"""),
    "car": phrases("""minivan | SUV | roadster | Toyota | BMW | Mercedes | Porsche | Audi | Honda | cab | station wagon
        | racing car | police car | *a vehicle with four wheels | *what you drive to work | *it needs petrol
        | *something that a chauffeur drives"""),
    "star": phrases("""Vega | Betelgeuse | Aldebaran | north star | five-pointed shape | *what twinkles above us
        | *a far away sun | *what astronomers look at | *the thing on top of a Christmas tree"""),
    "flower": phrases("""orchid | lilac | lily | hyacinth | iris | begonia | dandelion | poppy | peony | hibiscus
        | lavender | buttercup | aster | dahlia | *what bees visit | *what you give your mother
        | *it blooms and smells sweet | *something that a florist sells"""),
    "cat": phrases("""Persian | housecat | tomcat | calico | Sphynx | Maine coon | Bengal cat | puss
        | *a pet that hunts mice | *a small animal with whiskers and claws | *it chases mice | *what a dog chases"""),
    "bird": phrases("""crow | raven | swan | goose | duck | hen | rooster | parrot | swallow | finch | heron | peacock
        | magpie | wren | kingfisher | *an animal with wings and a beak | *it lays eggs in a nest | *what says tweet
        | *something with feathers"""),
    "balloon": phrases("""helium balloon | hot-air balloon | zeppelin | *what a clown gives to children
        | *it is full of helium | *it bursts with a bang | *an aircraft with a basket and a burner"""),
    "kite": phrases("""box kite | stunt kite | paper dragon on a line | *what children fly on a windy day
        | *it flies when you hold its line and run | *a thing of paper and sticks that the wind carries"""),
}  # fmt: skip
COLOURS = {
    "red": phrases("blood | a fire engine | a brick | a ruby | a lobster | a cherry | chilli | an English phone box"),
    "orange": phrases("a pumpkin | a carrot | a tangerine | a fox | a clementine | an oriole | a basketball"),
    "yellow": phrases("a banana | a canary | mustard | corn | honey | egg yolk | cheese | a school bus"),
    "green": phrases("an emerald | a cucumber | a frog | broccoli | lettuce | a crocodile | peas | an avocado"),
    "blue": phrases("a sapphire | blueberries | a cornflower | the sky | a policeman's uniform | a whale | Facebook"),
    "purple": phrases("a plum | an amethyst | grapes | beetroot | a lilac | a bishop's robe"),
    "pink": phrases("a piglet | salmon | cherry blossom | Barbie's clothes | bacon | a tongue | raspberry yoghurt"),
    "white": phrases("chalk | milk | ivory | a swan | sugar | a polar bear | paper | a bride's dress"),
}
COLOUR_NAMES = {
    "red": "cherry | ruby | maroon | blood red", "orange": "pumpkin | tangerine | amber | carrot coloured",
    "yellow": "mustard | canary | blonde | honey coloured", "green": "emerald | olive | mint | pea green",
    "blue": "sapphire | indigo | cobalt | denim", "purple": "plum | mauve | amethyst | grape coloured",
    "pink": "magenta | fuchsia | salmon coloured | blush", "white": "ivory | chalky | snowy",
}  # fmt: skip
SIZES = {
    "big": "massive | towering | jumbo | vast | king-size | hulking",
    "small": "petite | wee | teeny | microscopic | itty-bitty | pocket-sized",
}
PLACES = {
    "left": "on the left-hand side | at the left border | far left | to the left",
    "middle": "at the centre | dead centre | halfway across | in the middle",
    "right": "on the right-hand side | at the right border | far right | to the right",
}
SCENES = {
    "sea": phrases("""in the Pacific | on the Indian Ocean | in the North Sea | in the gulf | off the coast of Ireland
        | on the high seas | in a bay | where whales live | in the Black Sea"""),
    "meadow": phrases("""in a pasture | on the prairie | on a lawn | where cows eat grass | among the clover
        | at a picnic in the grass | on farmland | in the green fields of Kent"""),
    "snow": phrases("""in Greenland | in Alaska | on a glacier | after an avalanche | in Norway at Christmas
        | where polar bears live | on the ice of Iceland | on a ski slope"""),
    "city": phrases("""in Berlin | in New York | in Madrid | in Rome | in Boston | in Moscow | in Beijing | in Sydney
        | in Mumbai | in Toronto | in Hong Kong | among skyscrapers | downtown"""),
    "desert": phrases("""in the Sahara | in the Negev | in Arizona's driest part | in the outback | where scorpions live
        | in an endless plain of sand | in the Sonora | in dry Arabia"""),
    "mountains": phrases("""in the Alps | in the Himalayas | on Kilimanjaro | in Tyrol | in Nepal | in the Carpathians
        | on Mount Fuji | where climbers go | high up in Switzerland"""),
}  # fmt: skip
TIMES = {
    "day": phrases("""at ten in the morning | at breakfast time | in blazing sunshine | at one in the afternoon
        | in broad light | while the children are at school"""),
    "sunset": phrases("""as the sun sets | in the evening glow | at the golden hour | when daylight ends
        | while the sky turns red at the end of the day"""),
    "night": phrases("""when bats fly | under the stars | past bedtime | at two a.m. | by moonlight | in the small hours
        | when it is pitch dark"""),
}  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' and not word.startswith('one') else 'a'} {word}"


def named(rng: np.random.Generator, kind: str, colour: str | None, size: str | None) -> str:
    """A thing in other words, with its colour and size, where they are given."""
    name, compared = pick(rng, KINDS[kind]), pick(rng, COLOURS[colour]) if colour else ""
    if name.startswith("*"):
        name = name[1:]
        joined = (", and it is" if name.startswith("it ") else ",") if colour or size else ""
        large = {"big": " huge", "small": " tiny", None: ""}[size]
        shade = f" the colour of {compared}" if colour else ""
        return f"{name}{joined}{large}{' and' if large and shade else ''}{shade}"
    large = f"{pick(rng, phrases(SIZES[size]))} " if size else ""
    if not colour:
        return article(large + name)
    how = rng.random()
    if how < 0.3:
        return article(f"{large}{pick(rng, phrases(COLOUR_NAMES[colour]))} {name}")
    if how < 0.6:
        return f"{article(large + name)}, coloured like {compared}"
    return (
        f"{article(large + name)} {pick(rng, ('the colour of', 'as ' + colour + ' as', 'that looks like'))} {compared}"
    )


def wide_wish(rng: np.random.Generator, split: str) -> tuple[str, Picture]:
    """A wish for one thing, or in a quarter for two; about half of the facts beside the kinds are named."""
    picture = sample_picture(rng, split, 2 if rng.random() < 0.25 else 1)
    things = []
    for thing in picture.things:
        colour, size = (
            value if rng.random() < share else None for value, share in ((thing.colour, 0.5), (thing.size, 0.2))
        )
        text = named(rng, thing.kind, colour, size)
        things.append(f"{text} {pick(rng, phrases(PLACES[thing.place]))}" if rng.random() < 0.15 else text)
    parts = [pick(rng, (" and ", " beside ", " next to ", ", ")).join(things)]
    around = [pick(rng, SCENES[picture.scene])] * (rng.random() < 0.5) + [pick(rng, TIMES[picture.time])] * (
        rng.random() < 0.35
    )
    parts = around + parts if rng.random() < 0.15 else parts + around
    text = pick(rng, (" ", " ", ", ")).join(parts)
    before = pick(rng, ("", "", "", "", "draw ", "i would like ", "please paint ", "show me "))
    return typed(rng, before + text), picture
