"""The phrases that people's wishes and chats are made of (`wishes.py`, `chats.py`), beside the words of captions.

Alternatives stand in one text, "boat | ship"; {} and {0}, {1} are filled in.
"""

# ---- wishes

MORE_NOUNS = {
    "ball": "football | soccer ball | rubber ball | round ball | basketball | sphere | tennis ball | "
    "beachball | volleyball | handball | globe | marble | cricket ball",
    "house": "home | cabin | building | villa | farmhouse | barn | bungalow | lodge | homestead | "
    "wooden house | dollhouse | country house",
    "tree": "oak | oak tree | pine | pine tree | apple tree | maple | birch | willow | palm tree | fir tree | "
    "beech | cedar | conifer | evergreen | sapling | christmas tree | cherry tree | palm",
    "boat": "yacht | sailing ship | vessel | dinghy | fishing boat | rowing boat | canoe | ferry | sail boat | "
    "raft | rowboat | steamer | steamboat | speedboat | motorboat | sloop | barge | tugboat | cruise ship",
    "fish": "goldfish | fishy | salmon | trout | carp | tuna | guppy | clownfish | tropical fish",
    "car": "auto | vehicle | sedan | sports car | race car | taxi | cab | van | "
    "racecar | minivan | roadster | limo | cabriolet",
    "star": "bright star | shooting star | shining star | north star | lucky star",
    "flower": "rose | tulip | sunflower | lily | bloom | poppy | orchid | flower head | "
    "dandelion | peony | dahlia | bluebell | buttercup | pansy | lotus",
    "cat": "kitten | tomcat | feline | house cat | kitty cat | pussy cat | pet cat",
    "bird": "sparrow | seagull | gull | robin | eagle | dove | parrot | swallow | crow | "
    "finch | raven | swan | hummingbird | canary | pelican | magpie",
    "balloon": "air balloon | hot air balloon | helium balloon | baloon | airballoon",
    "kite": "toy kite | flying kite | diamond kite | wind kite | stunt kite",
}
MORE_COLOURS = {
    "red": "ruby | ruby red | cherry red | blood red | dark red | light red | reddish | fire red | tomato red | "
    "burgundy | maroon | wine red",
    "orange": "amber | dark orange | light orange | carrot orange | orangey | pumpkin orange | copper | rusty orange",
    "yellow": "gold | canary yellow | sunny yellow | light yellow | yellowish | mustard yellow | lemon | "
    "blond | honey yellow | straw yellow | corn yellow",
    "green": "dark green | light green | grass green | lime | lime green | olive | greenish | forest green | "
    "mint green | mint | khaki | pea green",
    "blue": "dark blue | light blue | sky blue | navy | navy blue | azure | cobalt | bluish | sapphire | "
    "turquoise | aqua | indigo | cyan | baby blue | ultramarine | teal",
    "purple": "lilac | lavender | dark purple | light purple | magenta | plum | mauve | purplish | amethyst",
    "pink": "rose pink | hot pink | rosy | light pink | pinkish | salmon pink | rose coloured | fuchsia | baby pink",
    "white": "snowy white | ivory | whitish | bright white | chalk white | milk white | pearl white | off white",
}
MORE_SIZES = {
    "small": "wee | mini | miniature | very small | really small | quite small | teeny | teeny tiny | "
    "very tiny | short",
    "big": "gigantic | massive | great big | very big | very very big | really big | very large | tall | enormous | "
    "super big | quite big",
}
MORE_PLACES = {
    "left": "on the left side of the picture | at the left side | left | far left | to the left side | "
    "on the very left",
    "middle": "in the very middle | in the middle of the picture | in the center of the picture | middle | centered",
    "right": "on the right side of the picture | at the right side | right | far right | to the right side | "
    "on the very right",
}
SETTINGS = {  # nouns of a scene, and what follows "in the": people use them in lists and sentences
    "sea": "sea | ocean | waves | water | open sea | blue sea | deep blue sea | deep sea | seaside | open water | "
    "shore | coast | seashore | pacific ocean | blue ocean | bay | harbour | port | beach | "
    "ocean view | sea view | lagoon | pier",
    "meadow": "meadow | field | grass | green field | grassy field | pasture | green meadow | lawn | green grass | "
    "countryside | grassland | flowery meadow | farmland | prairie | "
    "garden | park | farm | backyard",
    "snow": "snow | winter | ice | white snow | deep snow | snowy field | snowy landscape | winter landscape | "
    "frozen land | winter wonderland | cold snow | snowfield | arctic | snowy ground | "
    "snowstorm | glacier",
    "city": "city | town | street | big city | busy street | downtown | road | city street | metropolis | "
    "city centre | streets | tall buildings | skyscrapers | urban street | main street | skyline | "
    "city skyline | village | suburb | alley | market place | shopping street",
    "desert": "desert | sand | dunes | sand dunes | hot desert | sahara | dry desert | yellow sand | sandy desert | "
    "pyramids | egypt | hot sand | desert sand | oasis | wasteland",
    "mountains": "mountains | alps | mountain | peaks | valley | lake | high mountains | hills | mountain valley | "
    "mountain lake | mountain range | snowy peaks | rocky mountains | highlands | himalayas | "
    "cliffs | summit | canyon | hillside | mountainside | ridge | slopes",
}
MORE_SCENES = {
    "sea": "out at sea | on the water | by the sea | in the sea | at the coast | in the ocean | in the waves | "
    "near the sea | at the beach | in the harbour | in the port | above the water | under the sea | by the seaside | "
    "on the high seas",
    "meadow": "in a meadow | on a green field | in the grass | on the lawn | in the countryside | over the grass | "
    "on the meadow | in a field of grass | in a green meadow | over a meadow",
    "snow": "in winter time | in the ice | on a snowy field | in wintertime | in a winter landscape | over the ice | "
    "in the white snow | during winter | when it snows | covered in snow",
    "city": "in a city | in a big city | on the road | in the streets | in the street | in a town | in the big city | "
    "over the rooftops | between the buildings | in the city centre | above the skyscrapers | uptown",
    "desert": "in a desert | in the sand | on a dune | in the dunes | in the sahara | in the hot desert | in egypt | "
    "over the sand | near the pyramids | over a dune",
    "mountains": "in the hills | by the mountains | near the mountains | on a mountain | up in the mountains | "
    "in a valley | at the lake | high up in the alps | in front of the mountains | between the peaks | over a valley",
}
MORE_TIMES = {
    "day": "at day | in daylight | at midday | on a bright day | in the afternoon | on a nice day | at daytime | "
    "on a sunny morning | under the sun | in the sun | under a blue sky | in the bright sun",
    "sunset": "in the twilight | in the late evening | at sun down | during sunset | at the end of the day | "
    "in the evening sun | at dawn | at sunrise | while the sun sets | when the sun goes down | "
    "with a sunset | in the sunset",
    "night": "in the night | by night | at nighttime | in moonlight | in the moonlight | under a starry sky | "
    "late at night | at nightfall | beneath the moon | during the night | "
    "in the middle of the night | on a moonlit night | under the night sky",
}
SCENE_TIMES = {  # both in one phrase
    "snow day": "on a winter day | on a snowy day | on a cold winter morning | on a winter afternoon",
    "snow sunset": "on a winter evening | on a snowy evening | on a cold winter evening",
    "snow night": "on a winter night | on a snowy night | in a winter night | on a cold winter night",
    "city day": "on a city day | on a busy city morning",
    "city night": "in the city lights | in a city night | in the night of the city",
    "desert day": "in the heat of the desert | under the desert sun",
    "desert night": "on a desert night | in a cold desert night",
    "sea day": "on a day at sea | on a beach day",
    "sea sunset": "on an evening at sea | in a sea sunset",
    "sea night": "on a night at sea | on the moonlit sea | on a dark sea",
    "meadow day": "on a summer meadow | in a sunny meadow",
    "mountains day": "on a mountain morning",
    "mountains night": "on a mountain night",
}
TIME_NOUNS = {
    "day": "day | daytime | daylight | sunny day | noon | morning | midday | sunshine | by day",
    "sunset": "sunset | evening | dusk | twilight | sundown | at sunset",
    "night": "night | night time | midnight | moonlight | moonlit night | dark night | at night | nighttime",
}
TIME_STARTS = {  # clauses before "a red boat sails ..."
    "day": "the sun shines and | the sun is up and | it is day and | it is a bright day and | it is noon and",
    "sunset": "the sun goes down and | the sun is setting and | it is evening and | the evening comes and | "
    "the day ends and",
    "night": "the moon shines and | the stars are out and | it is night and | it is dark and | "
    "at night when it is dark | the moon shines on | the moon is over | the moon hangs above",
}
REQUESTS = (
    "draw {} | draw {} | draw {} | draw {} | please draw {} | please draw {} | "
    "can you draw {}? | can you draw me {}? | draw me {} | paint {} | please paint {} | "
    "show me {} | show me {}, please | please show me {} | show {} | i would like {} | i would like to see {} | "
    "i would like a picture of {} | i'd like to see {} | i want {} | i want to see {} | i want a picture of {} | "
    "make {} | make me {} | make a picture of {} | make an image of {} | make an image with {} | create {} | "
    "create an image of {} | generate {} | generate an image of {} | generate a picture with {} | picture of {} | "
    "a picture of {} | image of {} | an image of {} | a photo of {} | a drawing of {} | a painting of {} | "
    "an illustration with {} | could you paint {}? | could you please draw {}? | could i have {}? | may i see {}? | "
    "let me see {} | give me {} | give me a picture with {}, please | i need {} | i need a picture of {} | "
    "what does {} look like? | imagine {} | think of {} | hi, please draw {} | hello, can you paint {} for me? | "
    "{}, please | {} please | {} for my daughter | how about {}? | a scene with {} | sketch {} | render {} | "
    "would you draw {}? | please make {} for me | once upon a time there was {} | there was once {} | "
    "this is {} | here is {} | here we see {} | i see {} | i can see {} | we see {} | there you see {} | look, {} | "
    "wow, {} | in this picture there is {} | the picture shows {} | an artwork of {} | a nice picture of {} | "
    "a cartoon of {} | a beautiful drawing of {} | a view of {} | i dream of {} | my favourite is {} | just {} | "
    "only {} | simply {} | ok, now {} | now {}"
)
FILLERS = (
    "lonely | beautiful | cute | nice | pretty | lovely | funny | happy | old | new | shiny | sweet | "
    "wonderful | sad | "
    "single | quiet | friendly | fine | simple | colourful | magic | brave | fast | young | fluffy | wooden | cosy | "
    "sleepy | sleeping | playful | running | modern | grand | elegant | rusty | broken | famous | strange | "
    "mysterious | peaceful | dreamy | plain"
)
SKY = "in the sky | in the air | up in the sky | high in the sky | up in the air | flying high | overhead | high up"
JOINS = (
    "and | and | and | and | with | next to | beside | near | together with | plus | along with | close to | "
    "and also | by | as well as | alongside | and then | in front of | behind | on top of | close by"
)
LOOKS = (
    "looks at | watches | sees | likes | meets | is next to | is beside | is close to | waits for | dreams of | "
    "lies beside | stands next to | sits near | plays with | follows | waves to | is in front of | is behind | "
    "sits in | sits on | lives in | parks near"
)
ABSENT = (
    "but no {0} | without a {0} | without any {1} | and no {0} | with no {1} | but not a {0} | but there is no {0} | "
    "and no {1} | no {1} please | not a {0}"
)
STRANGERS = (  # what this world does not have
    "dog | horse | man | woman | girl | boy | robot | dragon | plane | train | bus | bicycle | bike | truck | rocket | "
    "castle | bridge | table | chair | apple | banana | cake | book | guitar | piano | mouse | rabbit | cow | pig | "
    "sheep | lion | tiger | elephant | monkey | bear | penguin | dolphin | whale | shark | spider | snake | frog | "
    "duck | chicken | unicorn | ghost | king | queen | princess | knight | pirate | wizard | clown | doctor | "
    "astronaut | umbrella | hat | shoe | phone | computer | lamp | clock | key | door | fence | tent | flag | drum | "
    "cup | bottle | pizza | hamburger | cheese | egg | carrot | mushroom | cactus | bush | rainbow | cloud | rain | "
    "volcano | island | helicopter | submarine | tractor | motorbike | skateboard | swing | statue | tower | church | "
    "windmill | mother | father | sister | brother | teacher | grandma | wife | husband | boss | neighbour"
)
STRANGE_COLOURS = "black | black | grey | gray | brown | silver | beige | transparent"
MORE_VERBS = {  # as in words.py: base, third person, participle
    "ball": "roll rolls rolling | spin spins spinning",
    "house": "lie lies lying | sit sits sitting",
    "tree": "rise rises rising",
    "boat": "glide glides gliding | move moves moving | pass passes passing",
    "fish": "jump jumps jumping | dive dives diving",
    "car": "drive drives driving | stop stops stopping | race races racing",
    "star": "twinkle twinkles twinkling | sparkle sparkles sparkling",
    "flower": "blossom blossoms blossoming | open opens opening",
    "cat": "sleep sleeps sleeping | play plays playing | run runs running | walk walks walking | lie lies lying",
    "bird": "sing sings singing | circle circles circling | sit sits sitting",
    "balloon": "rise rises rising | hang hangs hanging | fly flies flying",
    "kite": "sail sails sailing | hang hangs hanging | float floats floating",
}


TOO_MANY = "three | three | three | four | five | six | seven | eight | nine | ten | several"  # two are drawn
COMPARATIVES = {
    "big": "bigger | larger | much bigger | a bit bigger",
    "small": "smaller | much smaller | a bit smaller",
}
COUNTED = "two | two | two | a pair of | a couple of | 2 | twin | both | two identical | two equal"


# ---- chats

MORE_TALK = [
    "hello | hello, how nice to meet you.",
    "hi | hi, what shall i draw?",
    "hey | hey, what shall i draw for you?",
    "good evening | good evening, how are you?",
    "how are you? | i am fine, thank you. and you?",
    "i am fine | that is good to hear.",
    "thank you | you are welcome.",
    "thanks | you are welcome.",
    "thanks a lot | you are very welcome.",
    "ok | good, what shall i draw next?",
    "yes | good.",
    "no | all right.",
    "nice | thank you, i am happy that you like it.",
    "great | thanks, it was fun to draw.",
    "cool | thank you.",
    "that looks good | thank you, i am happy that you like it.",
    "i like it | i am glad to hear that.",
    "well done | thanks, drawing is what i like best.",
    "not bad | thank you.",
    "wonderful | thank you very much.",
    "bye | goodbye, see you soon.",
    "goodbye | goodbye, see you soon.",
    "see you later | goodbye, see you soon.",
    "what can you draw? | balls, houses, trees, boats, fish, cars, stars, flowers, cats, birds, balloons and kites.",
    "what can i ask for? | balls, houses, trees, boats, fish, cars, stars, flowers, cats, birds, balloons and kites.",
    "help | ask me for a picture, and then for changes to it.",
    "are you a robot? | i am a little painter and i tell stories too.",
    "who made you? | i was made from nothing, with many small pictures.",
    "do you like me? | yes, you are my friend.",
    "what is up? | not much, shall i draw something?",
    "i am bored | shall i draw something for you?",
    "it is raining here | then it is a good day for pictures.",
    "is it late? | i have no clock, but you may ask me for a night.",
]
TALK_FORMS = [  # what is said, what may fill its blank, the answer
    (
        "i feel {} today | i am {} today | i am so {} | i'm {} | i was {} yesterday | are you {}? | you are {}",
        "tired | sad | happy | glad | hungry | excited | lonely | sick | busy | alone | ready | clever | angry | bored",
        "i see. shall i draw something for you?",
    ),
    (
        "thank you for {} | thanks for {} | many thanks for {} | sorry for {} | tell me more about {}",
        "everything | your help | the picture | yesterday | that | your time | all of this | the nice words | the chat",
        "you are welcome.",
    ),
    (
        "can you {}? | do you {}? | could you {}? | will you {}? | i can {} | i like to {} | how do you {}?",
        "draw | paint | help me | hear me | read | write | think | dream | play | speak french | count | cook | "
        "dance | remember me | draw well | work | know me | learn | understand me",
        "i draw small pictures. ask me for one.",
    ),
    (
        "my {} is here | my {} says hello | my {} is away | how is your {}? | i miss my {} | this is for my {}",
        "mother | father | sister | brother | friend | teacher | family | grandma | wife | husband | boss | neighbour",
        "tell me more about it.",
    ),
    (
        "what {}? | tell me what {} | i wonder what {}",
        "do you think | is new | day is it | is the news | comes next | is the weather like | do you do all day | now",
        "i do not know much. shall i draw something?",
    ),
]
NO_PICTURE = "there is no picture yet. what shall i draw?"
PRAISE = (
    "nice | great | thanks | thank you | ok | good | cool | lovely | wow | beautiful | well done | i like it | perfect"
)
ORDERS = (
    "{} please | please {} | can you {}? | now {} | could you {}? | {} | {} | {} | {} | and now {} | "
    "i want you to {} | then {} | {}, please | could you please {}? | ok, now {}"
)
LESS = (
    "remove {} | take {} away | take away {} | delete {} | leave out {} | get rid of {} | "
    "erase {} | drop {} | i don't want {} | {} should go | make {} disappear"
)
AGAIN = "again | once more | one more time | draw it again | the same again | another one | show it again"


RECOLOURS = (
    "in {0} | {0} | {0} please | in {0} please | {0} instead | but {0} | the same but {0} | the same in {0} | "
    "another one, but {0} | another one in {0} | i want it {0} | i want a {0} one | no, a {0} one | now in {0} | "
    "it should be {0} | could it be {0}? | what about {0}? | and in {0}? | rather {0} | now {0} | a {0} one | "
    "can i have it in {0}? | make that {0} | i'd prefer {0} | it must be {0}"
)
BOTH_RECOLOURED = (
    "make them {0} | make them both {0} | make both {0} | make both of them {0} | paint them {0} | paint both {0} | "
    "turn them {0} | both {0} | both in {0} | {0}, both of them | colour them both {0} | make everything {0} | "
    "they should be {0} | they should both be {0} | make the two {0} | all {0} | all in {0} | i want them {0}"
)
RESIZES = (
    "{0} | {0} please | {0}, please | but {0} | i want it {0} | the same but {0} | now {0} | can it be {0}? | "
    "could it be {0}? | it should be {0} | a {0} one"
)
MOVES_IT = "{} | {} please | now {} | i want it {} | the same {} | more {} | it should be {}"
RETIMES = (
    "{0} | {0} please | now {0} | and {0}? | the same {0} | but {0} | what about {0}? | can you draw it {0}? | "
    "show it {0} | and now {0} | let it be {1} | make it {1} | turn it into {1} | it should be {1} | "
    "change it to {1} | how does it look {0}? | i want it {0} | {0} instead | the same picture {0} | "
    "could it be {1}? | make it {0} | draw the same {0} | how about {0}? | let {1} come"
)
RESCENES = (
    "the same {0} | {0} | now {0} | {0} please | put {1} {0} | and {0}? | the same picture {0} | but {0} | "
    "draw the same {0} | what about {0}? | show {1} {0} | move {1} {0} | i want {1} {0} | {0} instead | "
    "take {1} to {2} | how about {0}? | can you draw {1} {0}? | let it be {0} | change the place to {2} | "
    "now the same {0} | could you put {1} {0}? | again, but {0} | place {1} {0}"
)
ADDS = (
    "add {} | add {} | add {} | put {} into it | put {} there | draw {} too | draw {} next to it | put {} beside it | "
    "add {} to the picture | include {} | place {} next to it"
)
ADDS_TOO = (
    "and {} | with {} | also {} | plus {} | and {} please | with {} too | and also {} | i want {} too | "
    "now with {} | there should be {} too | {} too please | and {} next to it"
)
EXCHANGES = (  # {0} in the place of {1}
    "{0} instead of {1} | replace {1} with {0} | replace {1} by {0} | turn {1} into {0} | change {1} into {0} | "
    "without {1}, but with {0} | no {2}, but {0} | not {1} but {0} | remove {1} and add {0} | "
    "take {1} away and add {0} | swap {1} for {0} | {0}, not {1} | "
    "exchange {1} for {0} | put {0} where {1} is | delete {1} and draw {0}"
)
STARTS_ANEW = (  # who asks for another picture
    "now {} instead | draw {} instead | no, draw {} | instead, draw {} | something else: {} | something new: {} | "
    "a new picture: {} | a new picture of {} | forget that, {} | next, {} | next picture: {} | let's draw {} now | "
    "start over, draw {} | how about {} now? | and now something else: {} | another picture: {} | ok, next: {}"
)
SOUNDS_LIKE = {  # typos that are words themselves
    "sea": "see",
    "blue": "blew",
    "red": "read",
    "flower": "flour",
    "kite": "kit",
    "night": "knight",
    "boat": "boot",
    "car": "care",
    "house": "hose",
    "bird": "birth",
    "star": "stare",
    "cat": "cut",
    "ball": "bald",
    "fish": "fist",
    "pink": "pint",
    "white": "wide",
    "city": "cite",
    "desert": "dessert",
    "left": "lift",
    "right": "write",
}
