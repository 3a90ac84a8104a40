"""The rest of the world's general text: stories, letters, descriptions, weeks, small talk and sums, with
questions.

No document holds the task's summaries; the answers to questions are single words or short phrases.
"""

from itertools import pairwise
from random import Random

from world import (
    ACTIVITIES,
    ANIMALS,
    CHORES,
    COLOURS,
    DAYS,
    FOOD,
    JOBS,
    REASONS,
    ROOMS,
    THINGS,
    TIMES,
    TOWN,
    WEATHER,
    Chat,
    Option,
    article,
    joined,
    negotiated,
    pronouns,
    sample,
    say,
)

Questions = list[tuple[str, str]]
TAIL = "[| in the end| when all was said| by the end of the chat| if you read it again]?"
CLOCK = [time for time in TIMES if time.phrase.startswith("at ")]


def ask(rng: Random, questions: Questions, least: int, most: int) -> str:
    """Some of the questions with their answers, one after the other; '' for none."""
    count = min(len(questions), least + rng.randrange(most - least + 1))
    pairs = [f"Q: {say(rng, question)}\nA: {answer}" for question, answer in sample(rng, questions, count)]
    return "\n\n" + "\n".join(pairs) if pairs else ""


def chat_about_plan(rng: Random, names: list[str]) -> str:
    chat, plan = negotiated(rng, names)
    questions = [(question[:-1] + TAIL, answer) for question, answer in sorted(set(plan.questions()))]
    return chat.text() + ask(rng, questions, 0, 5)


class Scene:
    """People and things in places; every event changes the state and adds a sentence."""

    def __init__(self, rng: Random, names: list[str]):
        self.rng = rng
        spots = ROOMS if rng.randrange(2) else TOWN
        self.spots = sample(rng, spots, 3 + rng.randrange(2))
        self.people = sample(rng, names, 2 + rng.randrange(2))
        self.things = sample(rng, THINGS, 2 + rng.randrange(2))
        self.place = {person: rng.choice(self.spots) for person in self.people}
        self.thing_at: dict[str, Option | str] = {thing: rng.choice(self.spots) for thing in self.things}
        self.sentences: list[str] = []
        self.questions: Questions = []
        self.last = ""

    def tell(self, person: str, template: str, **slots: object) -> None:
        """A sentence about `person`, who is a pronoun where the sentence before was about the same one."""
        subject = pronouns(person)["he"] if person == self.last and self.rng.randrange(2) else person
        when = self.rng.choice(("",) * 5 + ("then ", "later ", "after that, ", "next, ", "soon ", "after "
                                                                                                  "a while "))
        self.sentences.append(say(self.rng, when + template, s=subject, **slots))
        self.last = person

    def begin(self) -> None:
        rng = self.rng
        day = rng.choice(("", "", f" {rng.choice(DAYS).phrase}", f" {rng.choice(CLOCK).phrase}"))
        self.sentences.append(say(rng, "it was a {w} [day|morning|afternoon|evening].|the weather was "
                                       "{w}.|one {w} day "
                                  "[a story began|this happened].|||", w=rng.choice(WEATHER)))
        for person in self.people:
            self.sentences.append(say(rng, "{s} was {p}{d}.|{s} [sat|waited|stood|worked] {p}{d}.", s=person,
                                      p=self.place[person].phrase, d=day))
            day = ""
        for thing in self.things:
            self.sentences.append(say(rng, "the {t} [was|lay|stood] {p}.|{p} there was {t2}.", t=thing,
                                      t2=article(thing), p=self.thing_at[thing].phrase))

    def event(self) -> None:
        rng, person = self.rng, self.rng.choice(self.people)
        here = self.place[person]
        held = [thing for thing in self.things if self.thing_at[thing] == person]
        near = [thing for thing in self.things if self.thing_at[thing] == here]
        friends = [other for other in self.people if other != person and self.place[other] == here]
        if held and friends and rng.randrange(2):
            thing, friend = rng.choice(held), rng.choice(friends)
            self.tell(person, "{s} [gave|handed|passed] the {t} to {f}.|{s} [gave|handed] {f} the {t}.",
                      t=thing, f=friend)
            self.thing_at[thing] = friend
            self.questions.append((f"who gave the {thing} to {friend}?", person))
        elif held and rng.randrange(3) == 0:
            thing = rng.choice(held)
            self.tell(person, "{s} [left the {t} there|put the {t} down {p}|left the {t} {p}].",
                      t=thing, p=here.phrase)
            self.thing_at[thing] = here
        elif near and rng.randrange(3):
            thing = rng.choice(near)
            self.tell(person, "{s} [took|picked up|got|grabbed] the {t}.", t=thing)
            self.thing_at[thing] = person
        else:
            goal = rng.choice([spot for spot in self.spots if spot != here])
            self.tell(person, "{s} [went|walked|ran|hurried|came] to {v}[| {why}].", v=goal.bare,
                      why=say(rng, "with a smile|in a hurry|again|without a word|to look "
                                   "around|slowly").lower())
            self.place[person] = goal
            self.questions.append((f"where was {person} before {goal.bare}?", here.phrase))

    def final_questions(self) -> Questions:
        found = self.questions[-2:]
        for person in self.people:
            found.append((f"where [is|was] {person}[| at the end| now]?", self.place[person].phrase))
            held = [f"the {thing}" for thing in self.things if self.thing_at[thing] == person]
            if held:
                found.append((f"what does {person} have[| now| at the end]?", joined(held)))
        for thing, spot in self.thing_at.items():
            if isinstance(spot, Option):
                found.append((f"where is the {thing}[| now| at the end]?", spot.phrase))
            else:
                found += [(f"who has the {thing}[| now]?", spot),
                          (f"where is the {thing}[| now]?", self.place[spot].phrase)]
        return sorted(set(found))


def story(rng: Random, names: list[str]) -> str:
    scene = Scene(rng, names)
    scene.begin()
    for _ in range(3 + rng.randrange(6)):
        scene.event()
    end = say(rng, "||that was all.|it was a good day.|everyone was [happy|tired|content].|then it was "
                   "time to go home.")
    return " ".join(filter(None, [*scene.sentences, end])) + ask(rng, scene.final_questions(), 1, 5)


def letter(rng: Random, names: list[str]) -> str:
    """News, thanks and an invitation, with questions about who and when."""
    writer, reader, third = sample(rng, names, 3)
    place, visit = sample(rng, TOWN, 2)
    day, time, thing = rng.choice(DAYS), rng.choice(TIMES), rng.choice(THINGS)
    where, doings = rng.choice(ACTIVITIES)
    doing, chore, food = rng.choice(doings), rng.choice(CHORES), rng.choice(FOOD)
    mine, told = rng.choice(REASONS)
    parts = [
        (say(rng, "I am {p} [now|today|again|this week], and it is {w}.|greetings from {v}! It is {w} "
                  "here.", p=place.phrase,
             v=place.bare, w=rng.choice(WEATHER)), [(f"where is {writer}?", place.phrase)]),
        (say(rng, "[thank you|many thanks] for the {t}[|, I use it every day|, it is just what I "
                  "needed].", t=thing),
         [(f"what did {reader} give to {writer}?", f"the {thing}"), (f"who gave the {thing}?", reader)]),
        (say(rng, "{c} [was|worked|waited] {p} {q}.|I met {c} {p} {q}.|I saw {c} {q} {p}.", c=third,
             p=visit.phrase, q=day.phrase),
         [(f"who was {visit.phrase}?", third), (f"when was {third} {visit.phrase}?", day.phrase)]),
        (say(rng, "I am sorry that I did not come. I {r}.|I could not come, because I {r}.", r=mine),
         [(f"why did {writer} not come?", f"{writer} {told.format(**pronouns(writer))}")]),
        (say(rng, "[can|could|will] you help me {d} {q}?|I want to {d} {q}, and I need help.",
             d=chore, q=day.phrase),
         [(f"what work does {writer} have?", chore), ("who needs help?", writer)]),
        (say(rng, "[please come|come and see me|I will be home|visit me] {q} {t}, [and|then] we can "
                  "{d}.|let us {d} {q} {t}.",
             q=day.phrase, t=time.phrase, d=doing),
         [("[what|which] day is the visit?", day.phrase), ("what time is the visit?", time.phrase),
          ("what can they do?", doing)]),
        (say(rng, "please bring the {f}.|[could|can] you bring some {f}?", f=food),
         [(f"what should {reader} bring?", f"the {food}"), (f"who should bring the {food}?", reader)]),
    ]
    chosen = sample(rng, range(len(parts)), 2 + rng.randrange(3))
    if {2, 4, 5} & set(chosen):  # one day a letter, so that each question has one answer
        keep = rng.choice(sorted({2, 4, 5} & set(chosen)))
        chosen = [number for number in chosen if number == keep or number not in (2, 4, 5)]
    questions = [(f"who wrote {'the letter' if rng.randrange(2) else 'to ' + reader}?", writer),
                 ("who got the letter?", reader)]
    questions += [question for number in chosen for question in parts[number][1]]
    body = " ".join(parts[number][0] for number in chosen)
    head = say(rng, "[dear|hello|my dear] {b},", b=reader)
    foot = say(rng, "[love|yours|best wishes|see you soon|kind regards|many greetings],") + "\n" + writer
    return f"{head}\n{body}\n{foot}" + ask(rng, questions, 0, 4)


def portrait(rng: Random, names: list[str]) -> str:
    """Two or three people with their jobs, homes, animals and likes."""
    sentences, questions = [], []
    for name in sample(rng, names, 2 + rng.randrange(2)):
        job, animal, colour = rng.choice(JOBS), rng.choice(ANIMALS), rng.choice(COLOURS)
        place, day, thing = rng.choice(TOWN), rng.choice(DAYS), rng.choice(THINGS)
        hobby = rng.choice(rng.choice(ACTIVITIES)[1])
        facts = [
            (say(rng, "{n} is {j}.|{n} works as {j}.", n=name, j=article(job)), (f"what is {name}'s "
                                                                                 f"job?", job)),
            (say(rng, "{n} has a {c} {a}.|the {c} {a} belongs to {n}.", n=name, c=colour, a=animal),
             (f"who has the {colour} {animal}?", name)),
            (say(rng, "{n} [lives|has a flat] near {v}.", n=name, v=place.bare), (f"where does {name} live?",
             f"near {place.bare}")),
            (say(rng, "{q} {n} likes to {d}.|{n} likes to {d} {q}.", n=name, q=day.phrase, d=hobby),
             (f"what does {name} like to do {day.phrase}?", hobby)),
            (say(rng, "{n} [owns|has] a {c} {t}.|{n} bought a {c} {t}.", n=name, c=colour, t=thing),
             (f"what colour is {name}'s {thing}?", colour)),
        ]
        for sentence, question in sample(rng, facts, 2 + rng.randrange(2)):
            sentences.append(sentence)
            questions.append(question)
    return " ".join(sentences) + ask(rng, sorted(set(questions)), 1, 4)


def week(rng: Random, names: list[str]) -> str:
    """A timetable: what one person does on which day, where and when."""
    name = rng.choice(names)
    lines, questions = [], []
    for day in [day for day in DAYS if rng.randrange(2)] or DAYS[:2]:
        where, doings = rng.choice(ACTIVITIES)
        doing, time = rng.choice(doings), rng.choice(TIMES)
        place = rng.choice(where).phrase if where else "at home"
        lines.append(f"{day.bare}: {doing} {place} {time.phrase}")
        questions += [(f"what [does {name} do|is the plan] {day.phrase}?", doing),
                      (f"when {day.phrase}?", time.phrase), (f"where is {name} {day.phrase}?", place)]
    head = say(rng, "{n}'s [week|plan|plan for the week|days]", n=name)
    return head + "\n" + "\n".join(lines) + ask(rng, questions, 1, 4)


def small_talk(rng: Random, names: list[str]) -> str:
    """A chat in which something is looked for or news is told; nothing is agreed."""
    a, b, c, d = sample(rng, names, 4)
    chat = Chat(rng)
    x, y = sample(rng, ROOMS + TOWN, 2)
    thing, day, animal = rng.choice(THINGS), rng.choice(DAYS), rng.choice(ANIMALS)
    questions = [("who [talks|is talking]?", joined([a, b]))]
    if rng.randrange(2):
        chat.say(a, "[hi|hello|hey] {b}[!|.]", b=b)
    if rng.randrange(2):
        chat.say(a, "[have you seen|do you know where|where did you put|who has] the {t}[?|, "
                    "please?]", t=thing)
        chat.say(b, "[isn't it {x}|it should be {x}|maybe {x}]?|I saw it {x} {q}.", x=x.phrase, q=day.phrase)
        chat.say(a, "no, [I looked there|it isn't there|it's not there any more].")
        if rng.randrange(2):
            chat.say(b, "[ah, |oh, |then ]{c} has it[!|.]|[oh, |]I gave it to {c}[| yesterday].", c=c)
            questions += [(f"who has the {thing}?", c)]
        else:
            chat.say(b, "[then|oh, then|ah, then] it's {y}[!|.]|[ah, |oh, |]I put it {y}[| "
                        "yesterday].", y=y.phrase)
            questions += [(f"where is the {thing}?", y.phrase)]
        chat.say(a, "[thanks|thank you|great|there it is][!|.|, {b}.]", b=b)
        questions += [(f"who looks for the {thing}?", a), (f"where is the {thing} not?", x.phrase)]
    else:
        chat.say(a, "[did you hear|have you heard|do you know]? {c} [was {x} {q}|bought a {n}|works {x} "
                    "now].|"
                 "guess what! {c} [was {x} {q}|bought a {n}|works {x} now].",
                 c=c, x=x.phrase, q=day.phrase, n=animal)
        chat.say(b, "[really|oh|no|wow][?|!] I thought that was {d}.|I know, {d} told me.|{d} too!", d=d)
        chat.say(a, "[no, it was {c}|yes, so it is|I only heard about {c}][!|.]", c=c)
        questions += [("who told the news?", a), ("who is the news about?", c)]
    chat.say(b, "[bye|take care|I must go|see you][!|.|, {a}!]", a=a)
    return chat.text() + ask(rng, questions, 0, 3)


NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
 sixteen seventeen eighteen nineteen twenty""".split()


def packing(rng: Random, names: list[str]) -> str:
    """The memory game: each player says again what is in the bag, and adds one thing. From lists that come
    again the base learns to look back and copy."""
    players, bag = sample(rng, names, 2 + rng.randrange(2)), []
    chat = Chat(rng)
    head = say(rng, "[I packed my bag and took|In my bag there is|we go on a trip and take]")
    things = THINGS + FOOD + [other for other in names if other not in players]
    wanted = sample(rng, things, 5 + rng.randrange(5))
    for turn, thing in enumerate(wanted):
        bag.append(thing)
        chat.say(players[turn % len(players)], "{h} {b}.", h=head, b=", ".join(bag))
    added = [(f"who added {thing}?", players[turn % len(players)]) for turn, thing in enumerate(wanted)]
    after = [(f"what comes after {thing}?", following) for thing, following in pairwise(wanted)]
    return chat.text() + ask(rng, added + after, 1, 4)


COUNTED = "apples oranges pencils books cups nuts eggs stones coins".split()


def sums(rng: Random, names: list[str]) -> str:
    """A few sums up to twenty, bare or in a story."""
    lines = []
    for _ in range(2 + rng.randrange(3)):
        x, y = 2 + rng.randrange(9), 2 + rng.randrange(9)
        a, b = sample(rng, names, 2)
        food = rng.choice(COUNTED)
        lines.append(say(
            rng, "{x} and {y} [make|are] {z}.|{z} minus {x} is {y}.|"
            "{a} has {x} {f}. {b} gives {him} {y} more. Now {a} has {z} {f}.|"
            "{a} had {z} {f}. {he} gave {x} to {b}. Now {a} has {y} {f}.|"
            "{a} has {x} {f} and {b} has {y}. Together they have {z}.",
            x=NUMBERS[x], y=NUMBERS[y], z=NUMBERS[x + y], a=a, b=b, f=food, **pronouns(a)))
    return "\n".join(lines)


KINDS = [chat_about_plan] * 11 + [story] * 4
KINDS += [letter, letter, portrait, portrait, week, small_talk, small_talk, sums, *[packing] * 4]


def document(rng: Random, names: list[str]) -> str:
    return rng.choice(KINDS)(rng, names)
