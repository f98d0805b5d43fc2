"""The phrases that people's wishes are made of (`wishes.py`), beside the words of captions.

Alternatives stand in one text, "boat | ship"; {} and {0}, {1} are filled in.
"""

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
    "motorcar | racecar | minivan | roadster | limo | cabriolet",
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
    "orange": "amber | dark orange | light orange | carrot orange | orangey | pumpkin orange | copper | rusty orange | "
    "ginger | fiery orange",
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
    "very tiny | short | lil | itty bitty | not so big | smallish | baby",
    "big": "gigantic | massive | great big | very big | very very big | really big | very large | tall | enormous | "
    "super big | quite big | rly big | rly rly big | biggest | sizable | grown up | extra large",
}
MORE_PLACES = {
    "left": "on the left side of the picture | at the left side | left | far left | to the left side | "
    "on the very left | off to the left | at left side | on left | left of centre",
    "middle": "in the very middle | in the middle of the picture | in the center of the picture | middle | centered | "
    "dead centre | dead center | right in the middle | exactly in the middle | smack in the middle | in middle",
    "right": "on the right side of the picture | at the right side | right | far right | to the right side | "
    "on the very right | off to the right | at right side | on right | right of centre",
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
    "with a sunset | in the sunset | with the sun setting | sunset vibes | as the evening sun gets low | before dark",
    "night": "in the night | by night | at nighttime | in moonlight | in the moonlight | under a starry sky | "
    "late at night | at nightfall | beneath the moon | during the night | "
    "in the middle of the night | on a moonlit night | under the night sky | at nite | tonight | around midnight | "
    "beneath the midnight moon | when it is dark",
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
    "only {} | simply {} | ok, now {} | now {} | "
    "i wonder whether you could manage {} | is it possible to get {}? | would it be possible to have {}? | "
    "would you be so kind as to paint {}? | would you kindly draw {}? | kindly draw {} for me | might i have {}? | "
    "i should very much like to see {} | i would love to see {} | i'd love {} | you make for me {}, yes? | "
    "please to make {} | i want picture of {} | i wish for {} | i was hoping for {} | i was thinking of {} | do {} | "
    "do you do {}? | do you have {}? | have you got {}? | could there be {}? | have you ever seen {}? | "
    "what would {} look like? | how would {} look? | what if there was {}? | what i picture is {} | "
    "what i need is {} | "
    "what i want is {} | it must be {} | it has to be {} | i am looking for {} | my son wants {} | he wants {} | "
    "my daughter would like {} | my little boy loves {} | she wants {} | we need {} for the wall | i remember {} | "
    "in my youth we had {} | when i was young we had {} | when i close my eyes i see {} | yesterday i saw {} | "
    "last night i dreamt of {} | i love {} | once there lived {} | somewhere there is {} | oh {} | behold {} | "
    "why is there never {}? make one | i said {} | i asked for {} | quick one: {} | asap: {} | {} asap | {} pls | "
    "pls {} | plz {} | {}, ok? | {}, that's it | {}, that's all | {}, thank you | thank you for {} in advance | "
    "{} for my wife | {} for a friend | {} for the nursery | {}, nothing fancy | nothing fancy, just {} | "
    "{} right now | can u do {} | can u draw {} | {} i guess | maybe {} | perhaps {} | say {} | scene: {} | "
    "{}, cartoon style | {}, much obliged | let us have {} | let's have {} | let's see {} | let's try {} | try {} | "
    "put {} there | fill the page with {} | give us {} | i'll take {} | i could use {} | surprise me with {} | "
    "today i want {} | today i feel like {} | tell me you can draw {} | it would be nice to see {}"
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
    "and also | by | as well as | alongside | and then | in front of | behind | on top of | close by | "
    "and my daughter wants | and somewhere | and i want | and not far away | and near it | and a friend of it: | "
    "followed by | accompanied by | , then | and i think there was | and over there | and don't forget | and maybe"
)
SIDES = "to the {0} of | to the {0} of | {0} of | on the {0} of | on the {0} side of"
LOOKS = (
    "looks at | watches | sees | likes | meets | is next to | is beside | is close to | waits for | dreams of | "
    "lies beside | stands next to | sits near | plays with | follows | waves to | is in front of | is behind | "
    "sits in | sits on | lives in | parks near"
)
ABSENT = (
    "but no {0} | without a {0} | without any {1} | and no {0} | with no {1} | but not a {0} | but there is no {0} | "
    "and no {1} | no {1} please | not a {0} | but leave out the {1} | minus the {0} | but i don't want any {1}"
)
ABSENT_FIRST = (
    "no {0} | please no {0} | no {1} | skip the {1} | skip the {0} | forget the {0} | without {1} | "
    "i don't want a {0} | "
    "i don't want any {1} | i don't need {1} | not a {0} | leave out the {1} | i hate {1} | enough {1}"
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
STRANGER_DOES = (
    "and | with | next to | beside | holding | under | sits near | rides past | looks at | carries | playing with | "
    "and my | on top of | sits under | stands under | sleeps under | in front of | wants | has | loves | talks to | "
    "runs after | behind | close to | is afraid of | finds"
)
COLOURED = (
    "that is | which is | in | coloured | of colour | , colour | what is | , painted | : colour | , must be | "
    ", and it is | "
    ", it should be | , i want it | and i want it | , but"
)
ARTICLES = " |  |  | one | the | my | this | some | our | a single | just one | only one | 1 | 1x | a certain"
THERE = (
    "there is | there's | there was | there stands | we have | i see | it is | i have | i want | draw | i need | "
    "here comes | look at | make | i would like | paint | i imagine | we need | can you draw"
)
SIZED = "that is | what is | which is | , it is | , so | , and it is | , it must be | ,"
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
    "big": "bigger | larger | much bigger | a bit bigger | way bigger | far bigger | a lot bigger | taller",
    "small": "smaller | much smaller | a bit smaller | way smaller | far smaller | a lot smaller | tinier",
}
APART = (
    "one on each side | one left and one right | side by side | next to each other | far apart | close together | both"
)
COUNTED = "two | two | two | a pair of | a couple of | 2 | twin | both | two identical | two equal"
