"""Wishes in wider English for SmolLM2's LoRA: the world's facts by other names, comparisons and descriptions.

What it learns here is to answer any such word with what it knows of it. None of them is a word that a prompt of
`knowledge.jsonl` needs (tests/test_knowledge.py).
"""

import numpy as np

from miniature.facts import Picture, pick, sample_picture
from miniature.wishes import related, typed
from miniature.words import plural


def phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.replace("\n", " ").split("|")]


KINDS = {  # names, without an article | after a star, descriptions
    "ball": phrases("""football | basketball | volleyball | sphere | globe | tennis ball | baseball | beach ball |
        marble | bowling ball | *what children throw and catch | *something round to play with | *a round toy that
        rolls | *what two football teams fight for | soccer ball | golf ball | ping-pong ball | rugby ball | cricket
        ball | snowball | handball | billiard ball | medicine ball | yarn ball | bouncy ball | rubber ball | balls of
        wool | pearl | bead | disco ball | Christmas bauble | cannonball | *what a tennis player hits | *what Ronaldo
        plays with | *it goes into the net when you score | *a puppy runs after it and brings it         back | *what
        you roll at the pins in bowling | *a perfectly round object | *what a juggler throws | *a         striker
        shoots it | *what a pitcher throws"""),
    "house": phrases("""villa | bungalow | hut | castle | farmhouse | manor | lodge | townhouse | hovel | country
        estate | *where a family lives | *a building with a door and windows | *what a bricklayer builds | *a home |
        apartment | barn | cottage | cabin | tower | fort | farm | school | church | temple | garage | shed | inn |
        hotel | hostel | ranch | dollhouse | semi-detached | croft | beach house | log cabin | treehouse | pagoda |
        windmill | *a place to sleep and cook | *what an architect designs | *where you hang your coat         when
        you come back from work | *four walls and windows | *what a real estate agent sells | *grandma's         place
        | *where Hansel and Gretel met the witch | *it has a kitchen and a bathroom"""),
    "tree": phrases("""birch | willow | beech | cedar | palm tree | fir | olive tree | apple tree | chestnut |
        redwood | baobab | larch | yew | hazel | *what a squirrel climbs | *it has leaves, bark and roots | *a woody
        thing in         which birds nest | *what a lumberjack cuts down | oak | pine | maple | ash | aspen | alder |
        linden | eucalyptus | acacia | mahogany | teak | sycamore | juniper | fig | mango tree | cherry tree | pear
        tree | lemon tree | coconut palm | magnolia tree | walnut | hawthorn | Christmas tree | hemlock | plane tree |
        ginkgo | rowan | *what paper is made from | *a monkey swings in it | *it loses its leaves in autumn | *what
        you decorate in December | *where apples grow | *a forest is full         of them | *what a beaver gnaws"""),
    "boat": phrases("""canoe | dinghy | raft | ferry | steamer | barge | tugboat | galleon | warship | lifeboat |
        rowboat | clipper | sloop | ketch | cutter | *what a sailor steers | *it floats and has a mast | *something
        that a captain commands | ship | yacht | trireme | ark | hovercraft | tanker | freighter | cruise ship | ocean
        liner | Titanic | brig | junk | submarine | motorboat | speedboat | sailboat | fishing boat | paddle
        boat | Viking ship | punt | skiff | launch | houseboat | narrowboat | *what Columbus crossed the ocean
        in | *you row it with oars | *a pirate commands it | *it sails when the wind blows | *what Noah built | *where
        fishermen work | *it is moored in a harbour | *a vehicle for water | *what a shipyard builds"""),
    "fish": phrases("""tuna | carp | pike | haddock | anchovy | piranha | guppy | sole | flounder | swordfish |
        bream | eel | perch | *an animal that lives under water and has scales | *what an angler hopes for | *it swims
        in an aquarium | salmon | trout | goldfish | shark | catfish | koi | clownfish | Nemo | barracuda | sturgeon |
        roach | stingray | puffer | seahorse | snapper | turbot | minnow | grouper | marlin | tilapia | anglerfish |
        monkfish | betta | sunfish | *what a fisherman hooks | *a shark or a trout | *what the         Japanese eat
        raw | *what a penguin eats | *it lives in a bowl of water on the shelf | *it breathes water | *sushi is made
        from it | *a pet that needs no walks and lives in a tank"""),
    "car": phrases("""minivan | SUV | roadster | Toyota | BMW | Mercedes | Porsche | Audi | Honda | cab | station
        wagon | racing car | police car | *a vehicle with four wheels | *what you drive to work | *it needs petrol |
        *something that a chauffeur drives | truck | van | taxi | pickup | sedan | Tesla | Ford | Fiat | Mini |
        Chevrolet | Cadillac | Lamborghini | Mustang | Jaguar | Bentley | Rolls-Royce | Peugeot | Renault | Hyundai |
        Nissan | Volvo | Skoda | Beetle | hot rod | lorry | ambulance | motorcar | wagon | buggy | sports car | *what
        stands in a garage | *a mechanic repairs it | *what teenagers want when they turn         eighteen | *you fill
        it up at a petrol station | *what Henry Ford made | *it stops at the lights | *what         Lewis Hamilton
        drives | *you get a licence to drive it"""),
    "star": phrases("""Vega | Betelgeuse | Aldebaran | north star | five-pointed shape | *what twinkles above us |
        *a far away         sun | *what astronomers look at | *the thing on top of a Christmas tree | sun far away |
        asterisk shape | supernova | Antares | Rigel | Alpha Centauri | Arcturus | Capella | shooting star | evening
        star | morning star | sheriff's badge | red giant | white dwarf | pulsar | *a distant sun in the sky | *you
        make a wish when you see it fall | *what sailors used to find their way | *there are fifty of them on
        the American flag | *it shines on a clear sky at dark | *you see it through a telescope | *what a
        sheriff wears | *billions of them make a galaxy"""),
    "flower": phrases("""orchid | lilac | lily | hyacinth | iris | begonia | dandelion | poppy | peony | hibiscus
        | lavender | buttercup | aster | dahlia | *what bees visit | *what you give your mother | *it blooms and
        smells sweet | *something that a florist sells | rose | tulip | daisy | sunflower | violet | pansy | snowdrop
        | crocus | bluebell | jasmine | lotus | primrose | foxglove | gardenia | camellia | magnolia | anemone |
        cornflower | forget-me-not | water lily | edelweiss | thistle | cowslip | gladiolus | zinnia | azalea |
        honeysuckle | snapdragon | narcissus | amaryllis | *what a groom gives a bride | *what grows in a garden
        bed and smells lovely | *it goes in a vase | *what a butterfly sits on | *a bouquet is made of them | *what a
        bee makes honey from | *what you pick for Valentine's day | *it blossoms in spring"""),
    "cat": phrases("""Persian | housecat | tomcat | calico | Sphynx | Maine coon | Bengal cat | puss | *a pet that
        hunts mice | *a small animal with whiskers and claws | *it chases mice | *what a dog chases | kitten | kitty |
        ginger tom | lynx | Burmese | Ragdoll | Russian blue | Angora | British shorthair | alley cat | stray
        cat | mouser | Abyssinian | tortoiseshell | pussycat | Cheshire cat | Tom from Tom and Jerry | Felix | *what
        has nine lives | *the pet that scratches sofas | *it licks its paws and sleeps all day | *the         enemy of
        mice | *it uses a litter box | *what a witch keeps | *its babies are called kittens | *it         hisses at
        dogs | *it always lands on its feet"""),
    "bird": phrases("""crow | raven | swan | goose | duck | hen | rooster | parrot | swallow | finch | heron |
        peacock | magpie | wren | kingfisher | *an animal with wings and a beak | *it lays eggs in a nest | *what says
        tweet | *something with feathers | robin | eagle | sparrow | seagull | penguin | ostrich | turkey | chicken |
        dove | blackbird | starling | nightingale | canary | budgie | cockatoo | macaw | hummingbird | pelican |
        puffin | vulture | condor | cuckoo | jay | lark | thrush | pheasant | quail | emu | kiwi | ibis | crane |
        jackdaw | kestrel | tern | goldfinch | Donald Duck | Tweety | *it flies south in winter | *what sings
        at dawn in the trees | *it eats worms and can fly | *what hatches from an egg and flies | *a parrot or
        an eagle | *what you put in a cage to hear it sing | *it builds a nest of twigs | *an ornithologist
        watches it | *a winged animal"""),
    "balloon": phrases("""helium balloon | hot-air balloon | zeppelin | *what a clown gives to children | *it is
        full of helium | *it bursts with a bang | *an aircraft with a basket and a burner | blimp | airship | party
        balloon | weather balloon | Zeppelin | gas balloon | water balloon | dirigible | aerostat | *what floats away
        when         a child lets go | *it hangs on a ribbon at a party | *it is made of rubber and full of air | *hot
        air         makes it rise | *what you fill with helium | *it rises when its air is heated"""),
    "kite": phrases("""box kite | stunt kite | paper dragon on a line | *what children fly on a windy day | *it
        flies when you         hold its line and run | *a thing of paper and sticks that the wind carries | delta kite
        | diamond kite | toy glider on a line | Chinese dragon kite | parafoil | flying dragon of paper | *a diamond
        of cloth that rises with the wind | *what you fly at the beach in autumn | *what Charlie Brown's tree eats |
        *what Mary Poppins's children fly | *a paper toy on a cord high up | *the thing that you run with until
        the wind takes it"""),
}  # fmt: skip
COLOURS = {
    "red": phrases("""blood | a fire engine | a brick | a ruby | a lobster | a cherry | chilli | an English phone
        box | a         tomato | a rose | a stoplight | a poppy | a ladybird | Santa's coat | a London bus | lipstick
        | the Swiss flag | beet juice | a beating heart | paprika | a radish | a cranberry | the planet Mars | fresh
        meat | a robin's breast | a post box"""),
    "orange": phrases("""a pumpkin | a carrot | a tangerine | a fox | a clementine | an oriole | a basketball | an
        orange | a         mandarin | a tiger | a goldfish | a papaya | a persimmon | rust | a monarch butterfly |
        sweet potatoes | a Dutch football shirt | an orangutan | Fanta | Halloween | a kumquat | cheddar | a life
        jacket | a peach | embers"""),
    "yellow": phrases("""a banana | a canary | mustard | corn | honey | egg yolk | cheese | a school bus | the sun
        | a lemon | a         sunflower | a duckling | a New York taxi | pineapple | a Post-it note | popcorn |
        sulphur | a baby chick | a submarine in the song | Bart Simpson | a minion | straw | gold | a daisy's centre |
        a tennis ball | sand | mimosa | omelette"""),
    "green": phrases("""an emerald | a cucumber | a frog | broccoli | lettuce | a crocodile | peas | an avocado |
        grass | a lime | a leaf | a cactus | a pickle | an olive | Shrek | a shamrock | parsley | a grasshopper | the
        Hulk | kiwi fruit | a lawn | Kermit | pistachio | a turtle | a cabbage | a Martian | Christmas holly | basil |
        an iguana | a lizard"""),
    "blue": phrases("""a sapphire | blueberries | a cornflower | the sky | a policeman's uniform | a whale |
        Facebook | the         ocean | a robin's egg | a swimming pool | a bluebird | the flag of Greece | ink | the
        Danube | a bruise | Dory | a peacock's neck | denim trousers | a dolphin | turquoise water | a nurse's uniform
        | the planet Neptune | an iceberg's shadow | a cold flame | Cookie Monster"""),
    "purple": phrases("""a plum | an amethyst | grapes | beetroot | a lilac | a bishop's robe | lavender | an iris
        | a violet | blackberry juice | a fig | red cabbage | an emperor's cloak | a bruised plum | wisteria | wine |
        Barney the dinosaur | thistle flowers | a turnip's top | acai | a witch's potion | an orchid | grape juice | a
        Milka cow"""),
    "pink": phrases("""a piglet | salmon | cherry blossom | Barbie's clothes | bacon | a tongue | raspberry
        yoghurt | a pig | a         ballerina's dress | a baby girl's blanket | ham | a shrimp | a prawn | watermelon
        flesh | the Pink         Panther | rhubarb | a grapefruit inside | a newborn mouse | a blushing face | peach
        blossom | tights of         a ballerina | Miss Piggy | a valentine | marshmallows"""),
    "white": phrases("""chalk | milk | ivory | a swan | sugar | a polar bear | paper | a bride's dress | snow | a
        cloud | a         ghost | a sheep | a wedding gown | toothpaste | flour | rice | a pearl | a tooth | an
        eggshell | a dove | vanilla ice | a lily | a snowman | bones | a blank page | cream | porcelain | cauliflower
        | a nurse's cap | an igloo's walls | foam | coconut"""),
}  # fmt: skip
COLOUR_NAMES = {
    "red": phrases("""cherry | ruby | maroon | blood red | brick red | tomato red | fire-engine red | cardinal |
        wine red | rusty red | lipstick red | poppy red | raspberry red"""),
    "orange": phrases("""pumpkin | tangerine | amber | carrot coloured | tiger orange | rusty | copper | peach
        coloured | persimmon | terracotta | mandarin coloured"""),
    "yellow": phrases("""mustard | canary | blonde | honey coloured | lemon | banana coloured | sunny | golden |
        corn coloured | sulphur | saffron | primrose | flaxen"""),
    "green": phrases("""emerald | olive | mint | pea green | lime | grass green | forest green | pistachio |
        bottle green | leaf         coloured | kiwi coloured | fern | sage"""),
    "blue": phrases("""sapphire | indigo | cobalt | denim | azure | ink coloured | ocean blue | sky coloured |
        ultramarine | aquamarine | teal | baby blue | midnight blue | steel blue"""),
    "purple": phrases("""plum | mauve | amethyst | grape coloured | blackberry coloured | lilac | wine coloured |
        heather | royal         purple | wisteria | fig coloured | magenta purple"""),
    "pink": phrases("""magenta | fuchsia | salmon coloured | blush | peachy pink | pig coloured | rose coloured |
        flesh         coloured | watermelon coloured | candy pink | hot pink"""),
    "white": phrases("""ivory | chalky | snowy | cream | vanilla | pearl coloured | bone coloured | paper white |
        eggshell | cloud coloured | lily white"""),
}  # fmt: skip
SIZES = {
    "big": phrases("""massive | towering | jumbo | vast | king-size | hulking | giant | gigantic | huge | enormous
        | great | monumental | mighty | gargantuan | oversized | supersized | tall | monstrous | whopping | as big as
        an elephant's"""),
    "small": phrases("""petite | wee | teeny | microscopic | itty-bitty | pocket-sized | little | tiny | mini |
        dwarf | miniature | baby | dainty | compact | pint-sized | toy-sized | bite-sized | diminutive | undersized"""),
}  # fmt: skip
PLACES = {
    "left": phrases("on the left-hand side | at the left border | far left | to the left"),
    "middle": phrases("at the centre | dead centre | halfway across | in the middle"),
    "right": phrases("on the right-hand side | at the right border | far right | to the right"),
}
SCENES = {
    "sea": phrases("""in the Pacific | on the Indian Ocean | in the North Sea | in the gulf | off the coast of
        Ireland | on         the high seas | in a bay | where whales live | in the Black Sea | in the Arctic Ocean |
        in the English         Channel | in the Gulf of Mexico | near Hawaii | off Cape Horn | in the Adriatic | in
        the Aegean | in the         Red Sea | among the waves | under the waves of Biscay | at the harbour | between
        two islands | near the lighthouse | where dolphins jump | on the billows | off the shore of Portugal | in the
        open water | where the captain sails | where sharks hunt"""),
    "meadow": phrases("""in a pasture | on the prairie | on a lawn | where cows eat grass | among the clover | at
        a picnic in the         grass | on farmland | in the green fields of Kent | in the countryside | in a garden |
        on a golf course | among daisies | on a football pitch | in a hayfield | where horses eat | in the Shire | in
        a green valley | where lambs play | on the village green | in the grassland | on a farm in Iowa | in tall
        grass | where rabbits hop | in the pampas | on the steppe | in the field behind the barn | among buttercups
        and bees"""),
    "snow": phrases("""in Greenland | in Alaska | on a glacier | after an avalanche | in Norway at Christmas |
        where polar         bears live | on the ice of Iceland | on a ski slope | in winter | in Siberia | in Finland
        | on the         tundra | in a snowstorm | at minus thirty degrees | in Yukon | on Christmas Eve | where
        penguins live | in the land of the Eskimos | on a frozen lake | where you build a snowman | in February in
        Sweden | on         the ice sheet | where huskies pull sledges | in the freezing cold | on the white slopes |
        in Santa's         country | in Svalbard | among icicles"""),
    "city": phrases("""in Berlin | in New York | in Madrid | in Rome | in Boston | in Moscow | in Beijing | in
        Sydney | in         Mumbai | in Toronto | in Hong Kong | among skyscrapers | downtown | in London's centre |
        in Chinatown | in San Francisco | in Los Angeles | in Singapore | in Istanbul | in Cairo's streets | in Vienna
        | in Shanghai | in Seoul | in Amsterdam | in Barcelona | in a metropolis | between tall buildings | on
        Broadway | on Fifth Avenue | in Brooklyn | in the town centre | near the Empire State Building | near
        Big Ben | at the Eiffel Tower | in an urban street | in Athens | in Lisbon | in Dubai | where the subway
        runs | in a capital | among the high-rises"""),
    "desert": phrases("""in the Sahara | in the Negev | in Arizona's driest part | in the outback | where
        scorpions live | in an         endless plain of sand | in the Sonora | in dry Arabia | in Egypt | on sand
        dunes | in Death Valley | near the pyramids | in an oasis | in Morocco's south | in Nevada's emptiness | among
        cacti | where it never rains | in Saudi Arabia | where a caravan rests | on burning sand | in the Karakum | in
        the Thar | in a dry, hot place | in Sudan | where cactuses grow | on Tatooine | in Dune | where rattlesnakes
        live | in a thirsty land | in Utah's dry land"""),
    "mountains": phrases("""in the Alps | in the Himalayas | on Kilimanjaro | in Tyrol | in Nepal | in the
        Carpathians | on Mount         Fuji | where climbers go | high up in Switzerland | on a summit | in the
        Dolomites | on a peak | near         Mont Blanc | in the Caucasus | in the Sierra Nevada | in Tibet | on K2 |
        in the Appalachians | where         eagles nest | where the mountain goats climb | at base camp | above the
        tree line | on a ridge | in the         Karakoram | in the highlands | in the Tatra | where Heidi lives | on
        Ben Nevis | among rocky peaks | in         a canyon with steep walls | where the cable car ends | in Bhutan"""),
}  # fmt: skip
TIMES = {
    "day": phrases("""at ten in the morning | at breakfast time | in blazing sunshine | at one in the afternoon |
        in broad         light | while the children are at school | at noon | in the morning | around midday | in the
        afternoon | at eleven a.m. | in full sun | at half past ten | under a blue sky | at high noon | in bright
        light | while the sun shines | at school hours | when shadows are shortest | during office hours | at brunch |
        at 2 p.m. | on a sunny morning | at teatime | at elevenses | while everyone works"""),
    "sunset": phrases("""as the sun sets | in the evening glow | at the golden hour | when daylight ends | while
        the sky turns         red at the end of the day | at dusk | in the evening | at twilight | at sundown | when
        the sun goes down | as night falls | at day's end | when the sky glows orange | just before dark | at eventide
        | at nightfall's beginning | when the sun touches the sea's edge | when it gets dark | in the last light |
        with a red sky | at 8 p.m. in summer | when the day is done | as the sun is setting | when romantics
        take photos of the sky"""),
    "night": phrases("""when bats fly | under the stars | past bedtime | at two a.m. | by moonlight | in the small
        hours | when         it is pitch dark | at midnight | in the dark | under the moon | at 3 in the morning |
        when people dream | after dark | when the moon is up | in the middle of the night | while the town
        sleeps | at bedtime | in darkness | under a full moon | when vampires wake | at one a.m. | when ghosts
        come out | with stars above | during a moonlit hour | late at night | when you should be in bed"""),
}  # fmt: skip

SOUNDS = """ph>f ck>k ie>ei ei>ie ou>oo c>k k>c ee>ea ea>ee tt>t ll>l nn>n rr>r ss>s l>ll s>ss n>nn t>tt a>e e>a i>y y>i
    er>or or>er gh> th>t sh>ch oo>u s>z z>s o>u qu>kw x>ks"""  # how a word sounds may also be written


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
    large = f"{pick(rng, SIZES[size])} " if size else ""
    if not colour:
        return article(large + name)
    how = rng.random()
    if how < 0.3:
        return article(f"{large}{pick(rng, COLOUR_NAMES[colour])} {name}")
    if how < 0.6:
        return f"{article(large + name)}, coloured like {compared}"
    return (
        f"{article(large + name)} {pick(rng, ('the colour of', 'as ' + colour + ' as', 'that looks like'))} {compared}"
    )


def of_one_kind(rng: np.random.Generator, picture: Picture) -> str:
    """Two things of one kind in other words: alike in colour, which may be named, or each with its own."""
    kind, (first, second) = picture.things[0].kind, (thing.colour for thing in picture.things)
    name = plural(pick(rng, [name for name in KINDS[kind] if not name.startswith("*")]))
    pair = f"{pick(rng, ('two', 'a pair of', 'a couple of', '2'))} "
    if first == second:
        return pair + (name if rng.random() < 0.5 else f"{pick(rng, COLOUR_NAMES[first])} {name}")
    first, second = (f"one the colour of {pick(rng, COLOURS[colour])}" for colour in (first, second))
    return f"{pair}{name}, {first} and {second}"


def misspelt(rng: np.random.Generator, text: str) -> str:
    """The text with a word written as it sounds."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) > 4]
    if long:
        i = pick(rng, long)
        fitting = [pair for pair in (sound.split(">") for sound in SOUNDS.split()) if pair[0] in words[i][1:]]
        if fitting:
            old, new = pick(rng, fitting)
            words[i] = words[i][0] + words[i][1:].replace(old, new, 1)
    return " ".join(words)


def wide_wish(rng: np.random.Generator, split: str) -> tuple[str, Picture]:
    """A wish for one thing, or in a quarter for two; about half of the facts beside the kinds are named."""
    picture = sample_picture(rng, split, 2 if rng.random() < 0.25 else 1)
    if len(picture.things) == 2 and rng.random() < 0.25:
        picture = related(rng, split)
    things = []
    for thing in picture.things:
        colour, size = (
            value if rng.random() < share else None for value, share in ((thing.colour, 0.5), (thing.size, 0.2))
        )
        text = named(rng, thing.kind, colour, size)
        things.append(f"{text} {pick(rng, PLACES[thing.place])}" if rng.random() < 0.15 else text)
    if len({thing.kind for thing in picture.things}) < len(picture.things):
        things = [of_one_kind(rng, picture)]
    parts = [pick(rng, (" and ", " beside ", " next to ", ", ", " above ", " with ")).join(things)]
    around = [pick(rng, SCENES[picture.scene])] * (rng.random() < 0.5)
    around += [pick(rng, TIMES[picture.time])] * (rng.random() < 0.35)
    parts = around + parts if rng.random() < 0.15 else parts + around
    text = pick(rng, (" ", " ", ", ")).join(parts)
    before = pick(rng, ("", "", "", "", "draw ", "i would like ", "please paint ", "show me "))
    text = before + text
    return typed(rng, misspelt(rng, text) if rng.random() < 0.15 else text), picture
