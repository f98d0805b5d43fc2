"""The phrases that people's chats are made of (`chats.py`), beside those of wishes.

Alternatives stand in one text; {} and {0}, {1} are filled in.
"""

NO_WISH = "i draw small pictures. ask me for one."
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
    "ty | you are welcome.",
    "thx | you are welcome.",
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
        NO_WISH,
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
SWAPPED = (
    "swap them | swap the two | the other way round | let them change places | switch their places | swap places | "
    "the other way around | change their places | exchange their places | left and right the other way round"
)
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
    "erase {} | drop {} | i don't want {} | {} should go | make {} disappear | lose {} | away with {} | "
    "without {} please | hide {} | i don't need {} any more | forget {}"
)
AGAIN = "again | once more | one more time | draw it again | the same again | another one | show it again"


RECOLOURS = (
    "in {0} | {0} | {0} please | in {0} please | {0} instead | but {0} | the same but {0} | the same in {0} | "
    "another one, but {0} | another one in {0} | i want it {0} | i want a {0} one | no, a {0} one | now in {0} | "
    "it should be {0} | could it be {0}? | what about {0}? | and in {0}? | rather {0} | now {0} | a {0} one | "
    "can i have it in {0}? | make that {0} | i'd prefer {0} | it must be {0} | what if it was {0}? | how about {0}? | "
    "no, {0} | actually {0} | i meant {0} | i said {0} | no sorry, i meant {0} | hmm, {0} | try {0} | sorry, {0} | "
    "not {1}, {0} | not {1} but {0} | {0}, not {1} | {0} instead of {1} | i don't like {1}, make it {0} | {0} is better"
)
BOTH_RECOLOURED = (
    "make them {0} | make them both {0} | make both {0} | make both of them {0} | paint them {0} | paint both {0} | "
    "turn them {0} | both {0} | both in {0} | {0}, both of them | colour them both {0} | make everything {0} | "
    "they should be {0} | they should both be {0} | make the two {0} | all {0} | all in {0} | i want them {0}"
)
RESIZES = (
    "{0} | {0} please | {0}, please | but {0} | i want it {0} | the same but {0} | now {0} | can it be {0}? | "
    "could it be {0}? | it should be {0} | a {0} one | what if it was {0}? | i meant {0} | actually {0} | way {0}"
)
BOTH_RESIZED = (
    "make them {0} | make both {0} | make them both {0} | both {0} | they should be {0} | they should both be {0} | "
    "i want them {0} | draw both {0} | all {0} | make everything {0} | the two should be {0}"
)
OTHER_SIDE = (
    "other side | the other side | on the other side | to the other side | put it on the other side | opposite side | "
    "move it to the other side | no, the other side | the opposite side | it should be on the other side | other way"
)
COLOURS_SWAPPED = (
    "swap their colours | swap the colours | now swap their colours | the colours the other way round | "
    "i'd like the colours the other way around | exchange their colours | change their colours around | "
    "let them swap colours | give each the colour of the other | switch the colours | reverse the colours"
)
MOVES_IT = "{} | {} please | now {} | i want it {} | the same {} | more {} | it should be {}"
RETIMES = (
    "{0} | {0} please | now {0} | and {0}? | the same {0} | but {0} | what about {0}? | can you draw it {0}? | "
    "show it {0} | and now {0} | let it be {1} | make it {1} | turn it into {1} | it should be {1} | "
    "change it to {1} | how does it look {0}? | i want it {0} | {0} instead | the same picture {0} | "
    "could it be {1}? | make it {0} | draw the same {0} | how about {0}? | let {1} come | and it should be {1} | "
    "i prefer {1} | {1} would be nicer | i meant {0} | no, {0} | actually {0} | what if it was {1}? | not {2}, {1} | "
    "not {2} after all, i prefer {1} | {1} instead of {2} | no more {2}, make it {1} | it is {1} now"
)
RESCENES = (
    "the same {0} | {0} | now {0} | {0} please | put {1} {0} | and {0}? | the same picture {0} | but {0} | "
    "draw the same {0} | what about {0}? | show {1} {0} | move {1} {0} | i want {1} {0} | {0} instead | "
    "take {1} to {2} | how about {0}? | can you draw {1} {0}? | let it be {0} | change the place to {2} | "
    "now the same {0} | could you put {1} {0}? | again, but {0} | place {1} {0} | i meant {0} | actually {0} | "
    "no, {0} | "
    "make it {0} | what if {1} was {0}? | {1} should be {0} | not there, {0} | could this be {0}? | let's go {0}"
)
ADDS = (
    "add {} | add {} | add {} | put {} into it | put {} there | draw {} too | draw {} next to it | put {} beside it | "
    "add {} to the picture | include {} | place {} next to it | let's have {} next to it | give it {} | it needs {} | "
    "it needs a friend, {} | let {} join it | i miss {} | bring in {}"
)
ADDS_TOO = (
    "and {} | with {} | also {} | plus {} | and {} please | with {} too | and also {} | i want {} too | "
    "now with {} | there should be {} too | {} too please | and {} next to it | with {} beside it | plus {} please | "
    "and how about {}? | what about {} too? | maybe {} as well | {} as well"
)
EXCHANGES = (  # {0} in the place of {1}
    "{0} instead of {1} | replace {1} with {0} | replace {1} by {0} | turn {1} into {0} | change {1} into {0} | "
    "without {1}, but with {0} | no {2}, but {0} | not {1} but {0} | remove {1} and add {0} | "
    "take {1} away and add {0} | swap {1} for {0} | {0}, not {1} | "
    "exchange {1} for {0} | put {0} where {1} is | delete {1} and draw {0} | swap {1} for {0}, same spot | "
    "swap {1} for {0}, in the same place | {0} in the place of {1} | let {1} become {0} | i meant {0}, not {1}"
)
STARTS_ANEW = (  # who asks for another picture
    "now {} instead | draw {} instead | no, draw {} | instead, draw {} | something else: {} | something new: {} | "
    "a new picture: {} | a new picture of {} | forget that, {} | next, {} | next picture: {} | let's draw {} now | "
    "start over, draw {} | how about {} now? | and now something else: {} | another picture: {} | ok, next: {} | "
    "start again: {} | start again, {} | from the beginning: {} | all new: {} | a fresh one: {} | new one: {} | "
    "clear everything, {} | throw it away and draw {} | ok, different: {} | different picture: {} | new topic, {}"
)
