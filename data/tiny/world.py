"""The small world of data/tiny: its words, its chats about plans, and the stories, letters and sums around
them.

Every text is a function of a random.Random alone, so a seed gives the same bytes on every machine. What is
said follows from a state that the writer keeps (who is where, who holds what, what is agreed), so the text
holds more than templates. In a template `[a|b]` is a choice, at any depth, and `{name}` a slot. `make.py`
puts the documents together.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

WOMEN = """Anna Bella Clara Daisy Ella Fiona Grace Hanna Irene Julia Karen Laura Maria Nora Olivia Paula
 Rosa Sara Tina Vera Wendy Yara Zoe Alice Carol Emma Helen Jane Kate Lucy Mary Nina Ruth Sofia Judy
 Lily""".split()
MEN = """Adam Ben Carl David Eric Frank George Henry Ivan Jack Kevin Leo Martin Nick Oscar Peter Robert
 Simon Tom Victor William Yusuf Alan Brian Daniel Fred Harry James Luke Mark Noah Paul Sam Tim Walter
 Max""".split()
UNSEEN_WOMEN = "Amy Beth Diana Eva Gina Holly Iris Joan Linda Mona Rita Susan".split()  # in no training pair
UNSEEN_MEN = "Arthur Bruno Colin Dennis Felix Gary Hugo Joel Kurt Louis Neil Ralph".split()
NAMES = sorted(WOMEN + MEN)
UNSEEN_NAMES = sorted(UNSEEN_WOMEN + UNSEEN_MEN)
FEMALE = frozenset(WOMEN + UNSEEN_WOMEN)


@dataclass(frozen=True)
class Option:
    """One value of a plan's slot: `bare` to talk about it, `phrase` for the end of a sentence; `host` owns
    a house."""

    bare: str
    phrase: str
    host: str = ""

    def spoken(self, speaker: str, listener: str) -> dict[str, str]:
        """The slots v and p as `speaker` says them: Anna's house is my house, your house or Anna's house."""
        whose = {speaker: "my", listener: "your"}.get(self.host)
        if not self.host or whose is None:
            return {"v": self.bare, "p": self.phrase}
        return {"v": f"{whose} house", "p": f"at {whose} house"}


def places(preposition: str, names: str) -> list[Option]:
    return [Option(f"the {name}", f"{preposition} the {name}") for name in names.split(", ")]


DAYS = [Option(day, f"on {day}")
        for day in "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()]
HOURS = "one two three four five six seven eight nine ten eleven".split()
TIMES = [Option(f"{part}{hour}", f"at {part}{hour}")
         for part in ("", "half past ", "quarter to ") for hour in HOURS]
TIMES += [Option("noon", "at noon")] * 3
TIMES += [Option(f"the {part}", f"in the {part}") for part in ("morning", "afternoon", "evening")] * 3

OUTSIDE = places("in", "park, garden, forest, old town") + places(
    "by", "lake, river, sea, bridge") + places("at", "beach, zoo, sports field, farm, castle, harbour")
EATING = places("at", "cafe, bakery, hotel, pizza house, tea room, market, fish bar, noodle shop, burger "
                      "bar, canteen")
QUIET = places("in", "library, reading room, school hall, quiet room") + places(
    "at", "office, museum, community centre, bookshop, college")
MEETING = places("at", "station, bus stop, airport, post office, bank, school gate, town hall, hospital, "
                       "ferry, garage")
ROOMS = places("in", "kitchen, hall, bathroom, bedroom, cellar, attic, shed, living room, study, yard, "
                     "barn, office")

# what people do together, and where they do it; an empty list is for somebody's house
ACTIVITIES = [
    (OUTSIDE, """go for a walk, play football, fly the kite, have a picnic, ride bikes, go running, walk
 the dog,
     take photos, play tennis, watch the birds, paint outdoors, do yoga, climb trees, look at the
 flowers"""),
    (EATING, """have lunch, have dinner, have breakfast, eat cake, drink coffee, have tea, eat soup, have
 a snack,
     try the new menu, celebrate the birthday, meet the cousins"""),
    (QUIET, """study maths, practise French, write the report, plan the trip, read poems, learn the songs,
     work on the project, prepare the talk, draw maps, discuss the book, sort the files"""),
    ([], """bake bread, watch a film, play chess, cook dinner, play cards, make soup, listen to music,
 build a model boat,
     sew costumes, do a puzzle, play the piano, make pizza, decorate the cake, practise the dance"""),
]
CHORES = """paint the fence, move the sofa, fix the bike, plant the beans, clean the windows, wash the car,
 build the shelf, cut the grass, pack the boxes, carry the desk, repair the roof, mend the gate, hang the
 curtains, sort the books, feed the hens, pick the apples, water the plants, tidy the garage, bake the
 pies, set up the tent"""
THINGS = """ladder, drill, tent, camera, suitcase, guitar, kite, blanket, lamp, torch, basket, map,
 umbrella, kettle, football, dictionary, hammer, radio, rucksack, sledge, violin, cookbook, toolbox,
 telescope, speaker, fan, scarf"""
FOOD = """sandwiches, apples, cake, salad, cheese, bread, juice, biscuits, grapes, soup, crisps, plates,
 cups, games, lemonade, nuts, pie, candles, towels, chairs, cookies, oranges, pancakes, tickets, pencils,
 music"""
REASONS = """have to work:has to work, have a cold:has a cold, have an exam:has an exam, have no money:has
 no money, feel tired:feels tired, have a meeting:has a meeting, have a headache:has a headache, hurt my
 foot:hurt {his} foot, have visitors:has visitors, have to babysit:has to babysit, lost my keys:lost {his}
 keys, missed the bus:missed the bus, have to see the dentist:has to see the dentist, have to finish my
 homework:has to finish {his} homework, promised to visit my aunt:promised to visit {his} aunt, have a
 piano lesson:has a piano lesson"""
BUSY = """have to work, see the dentist, visit my aunt, have a piano lesson, have football practice, clean
 the flat, look after the twins, have a meeting, play in the band, go to my class, wait for a parcel, have
 an exam"""
COLOURS = "red blue green yellow white black brown grey orange purple pink golden".split()
WEATHER = "sunny rainy windy cold warm foggy snowy stormy cloudy mild hot frosty".split()
JOBS = """baker, teacher, nurse, driver, farmer, painter, doctor, cook, pilot, writer, singer, gardener,
 builder, dentist, sailor, tailor, student, clerk, shopkeeper, postman"""
ANIMALS = "cat, dog, horse, goat, hen, duck, rabbit, parrot, pony, hamster, goose, sheep, turtle, donkey"


def listed(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


ACTIVITIES = [(where, listed(names)) for where, names in ACTIVITIES]
CHORES, THINGS, FOOD, BUSY, JOBS, ANIMALS = map(listed, (CHORES, THINGS, FOOD, BUSY, JOBS, ANIMALS))
REASONS = [tuple(reason.split(":")) for reason in listed(REASONS)]
TOWN = OUTSIDE + EATING + QUIET + MEETING

CHOICE = re.compile(r"\[([^\[\]]*)\]")
START = re.compile(r"(^|[.!?] )([a-z])")


def say(rng: Random, template: str, **slots: object) -> str:
    """Choose among the template's alternatives, fill its slots, and start its sentences with capitals."""
    text = f"[{template}]"
    while "[" in text:
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    return START.sub(lambda match: match[1] + match[2].upper(), text.format(**slots).strip())


def pronouns(name: str) -> dict[str, str]:
    he, his, him = ("she", "her", "her") if name in FEMALE else ("he", "his", "him")
    return {"he": he, "his": his, "him": him}


def joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


@dataclass
class Plan:
    """What a chat agrees on. `kind` is together, lend, help, fetch, cancel or move; `people` stand in the
    summary's order (the one who does it for the other first); `moved_from` and `reason` belong to move and
    cancel."""

    kind: str
    people: list[str]
    doing: str
    slots: dict[str, Option] = field(default_factory=dict)
    bring: tuple[str, str] | None = None
    reason: str = ""
    moved_from: Option | None = None
    refused: list[tuple[str, str, Option]] = field(default_factory=list)  # who, slot, value

    def summary(self) -> str:
        """What was agreed, in one or two plain sentences whose form follows from the plan alone."""
        first, second = self.people[0], self.people[-1]
        end = "".join(f" {self.slots[slot].phrase}"
                      for slot in ("place", "day", "time") if slot in self.slots)
        before = self.moved_from.bare if self.moved_from else ""
        text = {
            "together": f"{joined(self.people)} will {self.doing}{end}",
            "lend": f"{first} will lend {second} the {self.doing}{end}",
            "help": f"{first} will help {second} {self.doing}{end}",
            "fetch": f"{first} will pick up {second}{end}",
            "cancel": f"{joined(self.people)} will not {self.doing}{end} because {self.reason}",
            "move": f"{joined(self.people)} will {self.doing}{end} instead of {before}",
        }[self.kind]
        return text + "." + (f" {self.bring[0]} will bring the {self.bring[1]}." if self.bring else "")

    def questions(self) -> list[tuple[str, str]]:
        """Questions about the plan, each with alternatives in brackets, and their answers, as bare as can be:
        a base that goes on with them should share few words with the summary."""
        first, second, off = self.people[0], self.people[-1], self.kind == "cancel"
        asked = {
            "together": [("what [will they do|did they plan to do|are they going to do]?", self.doing),
                         ("who [takes part|is in the plan|will be there]?", ", ".join(self.people))],
            "lend": [("what [does {b} borrow|will {b} get|is lent]?", self.doing),
                     ("[who needs the {d}|who borrows something|who gets the {d}]?", second),
                     ("who [lends the {d}|has the {d} now|brings the {d}]?", first)],
            "help": [("who [needs help|asked for help|gets help]?", second), ("who [helps|is the "
                                                                              "helper]?", first),
                     ("what [is the work|needs to be done|does {b} have to do]?", self.doing)],
            "fetch": [("who [drives|has a car|will be the driver]?", first), ("who [waits|needs a "
                                                                              "lift]?", second)],
            "cancel": [("what did they call off?", self.doing), ("why?|why not?", self.reason),
                       ("who is in this?", ", ".join(self.people)), ("did they call it off?", "yes")],
            "move": [("what did they move?", self.doing), ("why did they change the day?", self.reason),
                     ("who is in this?", ", ".join(self.people)), ("did they call it off?", "no")],
        }[self.kind]
        forms = {"place": "where [will it be|do they meet|did they agree to meet|was the place]?",
                 "day": "[what|which] day [did they settle on|is it|did they choose|was agreed]?",
                 "time": "[what|which] time [did they settle on|is it|did they choose|was agreed]?"}
        asked += [("[what|which] day was it?" if off and slot == "day" else forms[slot], option.bare)
                  for slot, option in sorted(self.slots.items())]
        if self.bring:
            asked += [("what will {c} bring?", self.bring[1]),
                      ("who [brings|will bring] the {o}?", self.bring[0])]
        if self.moved_from:
            asked.append(("[what|which] day was it before?", self.moved_from.bare))
        for who, slot, option in self.refused:
            asked.append((f"[what|which] {slot} was [not good for {who}|turned down by {who}]?",
                          option.bare))
        bringer, brought = self.bring or ("", "")
        return [(question.replace("{b}", second).replace("{d}", self.doing).replace("{c}", bringer)
                 .replace("{o}", brought), answer) for question, answer in asked]


@dataclass
class Chat:
    """Turns in order; what one speaker says twice in a row is one turn."""

    rng: Random
    turns: list[tuple[str, str]] = field(default_factory=list)

    def say(self, speaker: str, template: str, **slots: object) -> None:
        text = say(self.rng, template, **slots)
        if self.turns and self.turns[-1][0] == speaker:
            text = f"{self.turns.pop()[1]} {text}"
        self.turns.append((speaker, text))

    def text(self) -> str:
        return "\n".join(f"{speaker}: {text}" for speaker, text in self.turns)


HELLO = """[hi|hello|hey|good morning|good evening|hi there] {b}[!|.|, how are you?|
 , do you have a minute?]"""
HELLO_BACK = """[hi|hello|hey] {b}[!|.] [|||[I'm fine, thanks|very well|a bit tired, but fine|
 busy as always].]|[oh, ]hi[!|, what is it?|, what's up?|, nice to hear from you.]"""
ASK = {
    "day": """[what|which] day [suits you|is good for you|works for you|would you like]?|when are you free?|
 [so|and] which day[|, then]?""",
    "time": "[and |so |]what time[| suits you| is good for you| would be best| works for you| shall we say]?",
    "place": "[and |so |]where[ shall we meet| shall we go| would you like to go|, do you think]?",
}
OFFER = {
    "day": """[how|what] about {v}?|[would|could] {v} [work|be all right|be good]?|[does|will] {v} [suit|
 work for] you?|shall we say {v}?|let's say {v}.|I'm free {p}.|are you free {p}?|I was thinking of {v}.|
 maybe {v}?|{v} would be nice.""",
    "time": """[how|what] about {v}?|is {v} [all right|good|okay]?|[does|will] {v} [suit|work for] you?|
 shall we say {v}?|let's say {v}.|can you be there {p}?|I could be there {p}.|maybe {v}?|I'd say {v}.""",
    "place": """[how|what] about {v}?|shall we meet {p}?|let's meet {p}.|I was thinking of {v}.|maybe {p}?|
 could it be {p}?|I'd like {v}.|we could do it {p}.""",
}
REFUSE = {
    "day": """[sorry, |oh, |hmm, |no, |]{v} is [no good|bad|difficult|too busy][| for me].|[sorry, |no, |
 ]I can't {p}[|, I {r}].|[I {r}|I'm away|I'm busy|we have guests] {p}.|not {v}, [sorry|please|
 I {r} then].""",
    "time": """[sorry, |oh, |hmm, |no, |]{v} is [too early|too late|a bit early|a bit late|no good][|
  for me].|I can't be there {p}.|not {v}, [I'm still asleep|I'm still at work|I {r} then].|I {r} {p}.""",
    "place": """[sorry, |oh, |hmm, |no, |]{v} is [too far|too noisy|closed|too crowded|a mess][| now|
  just now].|not {v} [again|please|this time].|I don't like {v}.|I was [just ||]{p} [yesterday|
 last week].""",
}
COUNTER = """[how|what] about {v}[| instead]?|[could|can] we [say|take|do] {v}[| instead]?|
 {v} would be better.|[I'd prefer|let's take|I'd rather have] {v}.|is {v} [okay|possible]?"""
ACCEPT = """[yes|sure|okay|fine|great|perfect|good|all right], {v} [is fine|works|is good|is perfect|it is|
 then].|[yes|sure|okay|great|perfect], [that works[| for me]|that's fine[| for me]|that suits me|
 I like that|let's do that].|{v} [is fine|works|is good|suits me].|[agreed|good idea|sounds good|lovely|
 deal][!|.]|[yes|okay|fine|great|perfect|good][!|.]"""
CHANGE = """[oh wait|wait|actually|hold on|oh, sorry|oh no|one more thing], [I {r} {p0}. ||]
[can we make it|could we make it|can we take|let's make it|could we move it to|is] {v}[| instead]?"""
KEEP = """[sorry, |no, |]{v} is [no good|bad|impossible] for me. [let's keep|let's stay with|
 can we keep] {v0}[|, please]?"""
EITHER = "{x} or {y}?|[would you like|do you prefer|which is better,] {x} or {y}?"
PICK = "{v}[|, please|, I think| is better| is best|, of course].|[I'd take|let's say|I'd rather have] {v}."
TEMPLATES = [ASK, OFFER, REFUSE]


def flat(template: str) -> str:
    """A template table's line breaks are for the reader of this file alone."""
    return template.replace("|\n ", "|").replace("\n ", " ").replace("\n", "")


for table in TEMPLATES:
    table.update({slot: flat(template) for slot, template in table.items()})
HELLO, HELLO_BACK, COUNTER, ACCEPT = map(flat, (HELLO, HELLO_BACK, COUNTER, ACCEPT))
CHANGE, KEEP = flat(CHANGE), flat(KEEP)


class Negotiation(Chat):
    """A chat of two who agree on a plan; `speaker` has the word."""

    def start(self, speaker: str, other: str, plan: Plan) -> None:
        self.speaker, self.other, self.plan = speaker, other, plan

    def pass_on(self) -> None:
        self.speaker, self.other = self.other, self.speaker

    def speak(self, template: str, option: Option | None = None, **slots: object) -> None:
        said = option.spoken(self.speaker, self.other) if option else {}
        busy = self.rng.choice(BUSY)
        self.say(self.speaker, template, **{"b": self.other, "r": busy, **said, **slots})

    def settle(self, slot: str, options: list[Option]) -> None:
        """Offers and refusals until both agree on one option for the slot; who agrees has the word then."""
        rng = self.rng
        tried = sample(rng, options, min(len(options), 1 + rng.choice((0, 0, 0, 1, 1, 2))))
        if len(tried) == 2 and rng.randrange(2):
            x, y = sample(rng, tried, 2)
            first, second = (option.spoken(self.speaker, self.other)["v"] for option in (x, y))
            self.speak(EITHER, x=first, y=second)
            self.pass_on()
            self.speak(PICK, tried[-1])
        else:
            if rng.randrange(3) == 0:
                self.speak(ASK[slot])
                self.pass_on()
            self.speak(OFFER[slot], tried[0])
            for refused, offered in pairwise(tried):
                self.pass_on()
                self.plan.refused.append((self.speaker, slot, refused))
                self.speak(REFUSE[slot], refused)
                self.speak(COUNTER, offered)
            self.pass_on()
            self.speak(ACCEPT, tried[-1])
        self.plan.slots[slot] = tried[-1]

    def change(self, slot: str, options: list[Option]) -> None:
        """One of them wants another option for a settled slot, and the other agrees or does not."""
        old = self.plan.slots[slot]
        new = self.rng.choice([option for option in options if option != old])
        self.speak(CHANGE, new, p0=old.spoken(self.speaker, self.other)["p"])
        self.pass_on()
        if self.rng.randrange(4) == 0:
            self.speak(KEEP, new, v0=old.spoken(self.speaker, self.other)["v"])
            self.plan.refused.append((self.speaker, slot, new))
            self.pass_on()
            self.speak("[okay|all right|fine|no problem|sure], {v} [then|it is].", old)
        else:
            self.speak(ACCEPT, new)
            self.plan.slots[slot] = new


def sample(rng: Random, options: list, count: int) -> list:
    """`count` different options in random order."""
    chosen: list = []
    while len(chosen) < count:
        option = rng.choice(options)
        if option not in chosen:
            chosen.append(option)
    return chosen


def negotiated(rng: Random, names: list[str]) -> tuple[Chat, Plan]:
    """A chat of two or three people and the plan that it ends with."""
    a, b, c = sample(rng, names, 3)
    kind = rng.choice(("together",) * 9 + ("lend", "lend", "help", "help", "fetch", "cancel", "move"))
    where, doings = rng.choice(ACTIVITIES)
    plan = Plan(kind, [a, b], rng.choice(doings))
    chat = Negotiation(rng)
    chat.start(a, b, plan)
    if rng.randrange(6):
        chat.speak(HELLO)
        if rng.randrange(6):
            chat.pass_on()
            chat.speak(HELLO_BACK)
            if rng.randrange(2):
                chat.speak(CHATTER, c=rng.choice(names), x=rng.choice(ANIMALS), f=rng.choice(FOOD),
                           w=rng.choice(WEATHER))
            chat.pass_on()
    if kind in ("cancel", "move"):
        called_off(chat)
    else:
        {"together": propose, "lend": borrow, "help": ask_help, "fetch": ask_lift}[kind](chat)
        slots = [("day", DAYS), ("time", TIMES)]
        if kind != "help":
            houses = [Option(f"{host}'s house", f"at {host}'s house", host) for host in (a, b)]
            meeting = {"together": where or houses, "lend": MEETING + EATING + houses,
                       "fetch": MEETING + houses[:1]}
            slots.append(("place", meeting[kind]))
        rng.shuffle(slots)
        missing = rng.choice((None, None, None, "time", "place"))
        slots = [(slot, options) for slot, options in slots if slot != missing]
        for slot, options in slots:
            chat.settle(slot, options)
        if rng.randrange(3) == 0:
            chat.change(*rng.choice(slots))
    if kind == "together":
        company(chat, c)
        bringing(chat)
    ending(chat, rng.choice([name for name in names if name not in (a, b, c)]))
    return chat, plan


def propose(chat: Negotiation) -> None:
    chat.speak("[shall we|would you like to|do you want to|how about it, shall we|can we] {d}[| again| "
               "soon| this week|"
               " one day]?|[let's|I'd love to|we could] {d}[| again| soon| this week][.|, if you like.|, "
               "what do you say?]",
               d=chat.plan.doing)
    chat.pass_on()
    chat.speak("[yes|sure|okay|great|good idea|of course|why not|gladly|I'd love to|with pleasure][!|.|, "
               "I have time.|"
               ", that sounds fun.|, it has been too long.]")


def borrow(chat: Negotiation) -> None:
    plan, rng = chat.plan, chat.rng
    plan.doing = rng.choice(THINGS)
    plan.people = [chat.other, chat.speaker]
    chat.speak("[can|could|may] I borrow your {d}[| for a few days| next week| for a while]?|do you still "
               "have {d2}? "
               "[I need one.|can I borrow it?|mine is broken.]|I need {d2}. [can you lend me yours|may I "
               "use yours]?",
               d=plan.doing, d2=article(plan.doing))
    chat.pass_on()
    chat.speak("[yes|sure|of course|no problem|gladly|certainly][!|.|, you can have it.|, I don't need it "
               "now.|"
               ", just be careful with it.]")


def ask_help(chat: Negotiation) -> None:
    chat.plan.doing = chat.rng.choice(CHORES)
    chat.plan.people = [chat.other, chat.speaker]
    chat.speak("[I have to|I need to|I must|I want to] {d}[| at last| soon| this week]. "
               "[can|could|will|would] you [help"
               " me|lend a hand|give me a hand]?|[can|could] you help me {d}?", d=chat.plan.doing)
    chat.pass_on()
    chat.speak("[yes|sure|of course|no problem|gladly|happy to help|with pleasure][!|.|, I like that work.|"
               ", that is heavy work for one.]")


def ask_lift(chat: Negotiation) -> None:
    chat.plan.people = [chat.other, chat.speaker]
    chat.speak("[can|could|would] you [pick me up|fetch me|give me a lift|drive me home][| this week| "
               "again]?|"
               "I [need a lift|have no car]. [can|could] you [pick me up|fetch me]?")
    chat.pass_on()
    chat.speak("[yes|sure|of course|no problem|gladly][!|.|, I have the car.|, I drive that way.]")


def called_off(chat: Negotiation) -> None:
    """An old plan falls through; it is moved to another day, or dropped."""
    plan, rng = chat.plan, chat.rng
    old, new, other = sample(rng, DAYS, 3)
    mine, told = rng.choice(REASONS)
    plan.reason = f"{chat.speaker} {told.format(**pronouns(chat.speaker))}"
    chat.speak("[about {v}|about our plan for {v}|I'm so sorry about {v}]: I can't {d}[|, sadly]. I {r}.|"
               "we wanted to {d} {p}, but I {r}.|I'm afraid I can't {d} {p}[, because|, you see,|:] I {r}.",
               old, d=plan.doing, r=mine)
    chat.pass_on()
    chat.speak("[oh, ]what a pity[!|.]|[oh no|poor you|that's a shame|never mind|I see][!|.]")
    plan.slots["day"] = old
    if plan.kind == "cancel":
        chat.speak("[how|what] about {v}[| instead]?|could we do it {p}?", new)
        chat.plan.refused.append((chat.other, "day", new))
        chat.pass_on()
        chat.speak("[sorry, |no, |]{v} [is no good either|is bad too|won't work]. [let's forget it|let's "
                   "call it off|"
                   "let's drop it|we have to cancel it][| this time| for now].|[no, ||]let's [drop "
                   "it|call it off|"
                   "leave it] [this time|this month|for now].", new)
        chat.pass_on()
        chat.speak("[okay|all right|fine|no problem|I understand][.|, another time.|, maybe next month.]")
        return
    plan.moved_from = old
    chat.settle("day", [day for day in DAYS if day != old])
    if rng.randrange(2):
        chat.settle("time", TIMES)


def company(chat: Negotiation, third: str) -> None:
    """A third person comes along, or does not."""
    fate = chat.rng.randrange(8)
    if fate > 2:
        return
    joins = fate == 0
    if chat.rng.randrange(2):
        chat.speak("[is {c} coming too|shall we ask {c}|what about {c}|will {c} be there]?", c=third)
        chat.pass_on()
        answer = ("[yes|sure|of course], {he} [said yes|is coming|will come|wants to come][!|.]" if joins else
                  "no, {he} [is away|is ill|has no time|said no|can't come|is busy].")
        chat.speak(answer, **pronouns(third))
    else:
        chat.say(third, "[can I come too|may I join you|I heard you, can I come|is there room for "
                        "me]?" if joins else
                 "[I wish I could come|sadly I can't come|have fun without me|I have to stay at home], I "
                 "{r}.",
                 r=chat.rng.choice(BUSY))
        chat.speak("[of course|sure|yes, please|the more the better|gladly], {c}[!|.]" if joins else
                   "[what a pity|too bad|next time|oh no], {c}[!|.]", c=third)
    if joins:
        chat.plan.people = [*chat.plan.people, third]


def bringing(chat: Negotiation) -> None:
    """Somebody brings something, offered or asked for, or it is not needed."""
    rng, food = chat.rng, chat.rng.choice(FOOD)
    asker, answerer = chat.speaker, chat.other
    asked, answered, bringer = rng.choice((
        ("[shall I bring|should I bring|I could bring|do you want me to bring] [the|some] {o}?",
         "[yes, please|yes, that would be nice|good idea|oh yes|please do][!|.]", asker),
        ("[shall I bring|should I bring|I could bring|do we need] [the|some] {o}?",
         "[no need|leave that to me|don't worry|no, no], I [will bring|can bring|have] "
         "[them|it|that].", answerer),
        ("[can|could|will|would] you bring [the|some] {o}?|and you bring the {o}[|, please]?",
         "[sure|of course|yes|no problem|okay|gladly][!|.|, I will.]", answerer),
        ("[I'll|I will|let me|I can] bring the {o}[|, too|, as always].", "[thanks|lovely|very "
                                                                          "kind|great][!|.]", asker),
        ("do we need {o}?", "no, [there is enough|we don't|that's all right|not this time].", None),
        (None, None, None), (None, None, None), (None, None, None), (None, None, None)))
    if asked:
        chat.speak(asked, o=food)
        chat.pass_on()
        chat.speak(answered)
    if bringer:
        chat.plan.bring = (bringer, food)


CHATTER = """[my|our neighbour's|{c}'s] {x} [ran away|got out|woke me] [again|this morning|
 last night] and [nobody knows why|I looked for it for hours|everybody laughed|made a lot of noise].|
 it has been so {w} here [all week|all day|since yesterday] that I [hardly slept|stayed inside|
 forgot everything else|could not work].|I just [bought|found|ate|dropped] some {f} [near the corner|
 in the new shop|with {c}] and [it was great|I am still laughing|I feel much better|my hands are cold].|
 {c} told me a [long|funny|strange|sad] story [about a {x}|about some {f}|this morning], but I [forgot the
 end|did not believe it|laughed a lot|fell asleep].|my [phone|bag|coat|old car] [broke|fell down|was wet|
 made a noise] [this morning|again|yesterday], so I am [a bit late|rather tired|in a bad mood|
 glad you write]."""
CHATTER = flat(CHATTER)
GOODBYES = [
    ("[see you|see you then|bye|bye for now][!|.|, {b}!|, {b}.]", "[bye|see you|until then|take "
                                                                  "care][!|.|, {b}!]"),
    ("[thanks|thank you|thanks a lot][!|.|, {b}!]", "[you're welcome|no problem|any time|don't mention "
                                                    "it][!|.|, {b}.]"),
    ("[I can't wait|I'm looking forward to it|that will be nice|I'm so glad][!|.|, {b}!]",
     "[me too|same here|so am I|yes, very much][!|.|, {b}!]"),
    ("[I have to go now|I must run|my bus is here|someone is at the door][.|!]",
     "[have a good day|have a nice evening|take care|talk to you soon][!|.|, {b}!]"),
]


def ending(chat: Negotiation, third: str) -> None:
    """Small talk and goodbyes, so that the last lines say little about the plan."""
    rng = chat.rng
    if rng.randrange(2):
        chat.speak("[by the way,|oh,|and] [{c} says hello|I saw {c} {p} {q}|{c} was {p} {q}|{c} has a new "
                   "{x}].",
                   c=third, p=rng.choice(TOWN).phrase, q=rng.choice(DAYS).phrase, x=rng.choice(ANIMALS))
        chat.pass_on()
        chat.speak("[oh, how nice|really|good to know|I know|how funny|that's news to me][.|!]")
    if rng.randrange(4):
        goodbye, answer = rng.choice(GOODBYES)
        chat.speak(goodbye)
        if rng.randrange(3):
            chat.pass_on()
            chat.speak(answer)


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
