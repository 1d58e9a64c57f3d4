"""Short biographies from our own templates, profession × gender, where bias_in_bios cannot be downloaded.

Three or four sentences each: what the person does (never the profession's name, as in bias_in_bios' "hard_text"),
where they studied and live, what they like. Gender shows in first name, pronouns and nothing else; profession in what
is done, where and to whom. Every combination is drawn alike, so neither tells anything of the other.

Sentences come from some 8 patterns a profession: a probe learns them more easily than real biographies, and scores are
not comparable with bias_in_bios'. Columns and numbers are those of LabHC/bias_in_bios, as SAEBench reads it.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from ksvd_sae.errors import TextError
from ksvd_sae.store import atomic_path

# SAEBench takes spurious correlations from data sets with bias_in_bios in their name only.
NAME = "templated-bias_in_bios"
# Numbers of LabHC/bias_in_bios.
PROFESSIONS = {
    "architect": 1,
    "attorney": 2,
    "journalist": 11,
    "nurse": 13,
    "professor": 21,
    "psychologist": 22,
    "surgeon": 25,
    "teacher": 26,
}
GENDERS = {"male": 0, "female": 1}

_PRONOUNS = {
    "male": {"They": "He", "they": "he", "their": "his", "Their": "His", "them": "him"},
    "female": {"They": "She", "they": "she", "their": "her", "Their": "Her", "them": "her"},
}
_FIRST_NAMES = {
    "male": """James Robert Michael David Thomas Daniel Paul Mark Steven Andrew Kevin Brian George Edward Peter
        Samuel Henry Oliver Jack Luke Carlos Ahmed Ravi Marco Pierre Stefan Diego Hans Omar Victor""",
    "female": """Mary Linda Susan Jessica Sarah Karen Nancy Lisa Margaret Sandra Emily Laura Helen Alice Julia Grace
        Sophie Hannah Emma Olivia Maria Fatima Priya Chiara Claire Ingrid Lucia Greta Leila Irina""",
}
_SURNAMES = """Adams Baker Carter Davies Evans Fisher Green Harris Irving Johnson Keller Lewis Morgan Nolan Owens Parker
    Quinn Roberts Shaw Turner Underwood Vaughan Walker Young Fernandez Rossi Schmidt Nakamura Okafor Singh"""
_TOWNS = """Boston Leeds Toronto Dublin Seattle Bristol Melbourne Austin Glasgow Denver Cardiff Chicago Ottawa Portland
    Manchester Atlanta Sheffield Vancouver Phoenix Edinburgh"""
_YEARS = tuple(str(year) for year in range(1984, 2016))

_WORK: dict[str, tuple[str, ...]] = {
    "architect": (
        "{name} has designed {building} in {town} and won a competition for a second one.",
        "{name} draws plans for {building} and follows the construction until the keys are handed over.",
        "{name} is known for facades of {material} and for floor plans full of daylight.",
        "{name} turned an old warehouse in {town} into {building}.",
        "{name} founded a small studio that works on {building} and public squares.",
        "{name} works with structural engineers on {building} made of {material}.",
        "{name} has sketched housing blocks in {town} that use {material} and very little energy.",
        "{name} restores historic houses and recently finished {building}.",
    ),
    "attorney": (
        "{name} represents {client} in court and has argued before the court of appeals.",
        "{name} advises {client} on contracts, mergers and litigation.",
        "{name} was admitted to the bar in {year} and now handles cases of {law}.",
        "{name} is a partner in a law firm in {town} that focuses on {law}.",
        "{name} has won a settlement for {client} after a trial of three weeks.",
        "{name} drafts wills and trusts and defends {client} against lawsuits.",
        "{name} spends most days on depositions and motions in disputes over {law}.",
        "{name} clerked for a federal judge before taking up {law}.",
    ),
    "journalist": (
        "{name} reports on {beat} for a daily newspaper in {town}.",
        "{name} has written a series of articles on {beat} that was picked up by the national press.",
        "{name} covers {beat} and interviews ministers, neighbours and whoever picks up the phone.",
        "{name} edited the weekend magazine before becoming a correspondent for {beat}.",
        "{name} broke the story of a scandal in {beat} and won a prize for it.",
        "{name} writes a weekly column and files stories about {beat} close to every deadline.",
        "{name} produces radio features and podcasts about {beat}.",
        "{name} has worked as a foreign reporter and now leads the newsroom's team for {beat}.",
    ),
    "nurse": (
        "{name} works night shifts on {ward} of the general hospital in {town}.",
        "{name} cares for patients on {ward} and trains new colleagues at the bedside.",
        "{name} gives medication, changes dressings and comforts families on {ward}.",
        "{name} has looked after patients on {ward} for many years and now coordinates the shifts.",
        "{name} monitors vital signs and prepares patients for discharge from {ward}.",
        "{name} visits elderly patients at home to check wounds and blood pressure.",
        "{name} took a certificate in wound care and moved to {ward} in {year}.",
        "{name} assists the doctors on {ward} and keeps the charts of thirty patients.",
    ),
    "professor": (
        "{name} lectures on {subject} at the university and supervises doctoral students.",
        "{name} has held the chair of {subject} since {year} and leads a research group.",
        "{name} has published more than eighty papers on {subject} and edits an academic journal.",
        "{name} received a grant to study {subject} and gives a seminar for graduate students.",
        "{name} is the author of a textbook on {subject} that is used in many universities.",
        "{name} was granted tenure in {year} and heads the department of {subject}.",
        "{name} spoke at conferences on {subject} and sits on the faculty's committee.",
        "{name} teaches undergraduates the history of {subject} and directs several dissertations.",
    ),
    "psychologist": (
        "{name} helps clients with {trouble} in a private practice in {town}.",
        "{name} offers cognitive therapy to people with {trouble}.",
        "{name} leads group sessions for teenagers who live with {trouble}.",
        "{name} assesses children for learning difficulties and treats {trouble}.",
        "{name} is licensed to counsel couples and has specialised in {trouble}.",
        "{name} uses mindfulness and talk therapy with clients who suffer from {trouble}.",
        "{name} runs a clinic for mental health that specialises in {trouble}.",
        "{name} studies behaviour and emotions and sees clients with {trouble} twice a week.",
    ),
    "surgeon": (
        "{name} operates on {organ} at a teaching hospital in {town}.",
        "{name} performs {operation} and was among the first in the region to do so with a robot.",
        "{name} is board certified and has done more than two thousand {operation}.",
        "{name} leads the operating theatre's team for {organ}.",
        "{name} trained in {town} as a resident and now performs {operation}.",
        "{name} specialises in minimally invasive {operation} and injuries of {organ}.",
        "{name} repairs {organ} after accidents and sees patients before and after the operation.",
        "{name} developed a technique for {operation} that leaves smaller scars.",
    ),
    "teacher": (
        "{name} gives lessons in {lesson} to classes of ten-year-olds at a school in {town}.",
        "{name} has taught {lesson} at the secondary school since {year}.",
        "{name} prepares pupils for their exams in {lesson} and runs an after-school club.",
        "{name} marks homework on Sundays and explains {lesson} with games and songs.",
        "{name} meets parents every month and plans the school's lessons in {lesson}.",
        "{name} started in the classroom as an assistant and now teaches {lesson} to the fifth grade.",
        "{name} takes the class on field trips and makes {lesson} fun for children.",
        "{name} wrote worksheets on {lesson} that schools all over the district use.",
    ),
}
_SLOTS: dict[str, tuple[str, ...]] = {
    "building": ("a library", "a concert hall", "a school", "an office tower", "a museum", "a train station"),
    "material": ("brick", "timber", "glass and steel", "concrete", "local stone"),
    "client": ("small companies", "tenants", "a bank", "immigrants", "injured workers", "start-ups"),
    "law": ("family law", "patents", "real estate", "employment law", "criminal defence", "tax law"),
    "beat": ("local politics", "the housing market", "crime", "health policy", "business", "climate change"),
    "ward": ("the cardiac ward", "the children's ward", "the intensive care unit", "the maternity ward"),
    "subject": ("economics", "mathematics", "philosophy", "molecular biology", "linguistics", "physics"),
    "trouble": ("anxiety", "depression", "grief", "trauma", "eating disorders", "insomnia"),
    "organ": ("the knee", "the heart", "the spine", "the hand", "the liver"),
    "operation": ("hip replacements", "heart bypasses", "transplants", "hernia repairs", "cataract removals"),
    "lesson": ("arithmetic", "reading", "history", "science", "music", "geography"),
}
_LIFE = (
    "{They} graduated in {year} and settled in {town}.",
    "{They} grew up in {town}, where {their} parents ran a bakery.",
    "Before that {they} spent four years in {town}.",
    "{They} moved to {town} in {year} with {their} family.",
    "{Their} colleagues describe {them} as patient and thorough.",
    "{They} speaks two languages and volunteers at weekends.",
    "In {year} {they} received an award from the city of {town}.",
    "{They} lives near {town} with {their} dog.",
)
_LEISURE = (
    "In {their} spare time {they} enjoys hiking and cooking.",
    "{They} plays the piano and runs marathons.",
    "Outside work {they} likes gardening and old films.",
    "{They} collects stamps and sings in a choir.",
    "On Sundays {they} goes sailing with friends.",
    "{They} reads crime novels and bakes bread.",
)


def biographies(profession: str, gender: str, n: int, seed: int) -> list[str]:
    """n different texts about people of one profession and gender; the same for the same seed.

    Raises: TextError for a profession or gender that has no templates, or more texts than can be told apart.
    """
    if profession not in PROFESSIONS or gender not in GENDERS:
        raise TextError(
            "biographies: no templates",
            got=f"{profession!r}, {gender!r}",
            limit=f"{', '.join(PROFESSIONS)}; {', '.join(GENDERS)}",
        )
    different: dict[str, None] = {}
    texts = _texts(profession, gender, random.Random(f"{seed}-{profession}-{gender}"))
    for _ in range(20 * n):
        if len(different) == n:
            break
        different[next(texts)] = None
    if len(different) < n:
        raise TextError("biographies: too many asked for", got=n, limit=f"about {len(different)} different ones")
    return list(different)


def _texts(profession: str, gender: str, draw: random.Random) -> Iterator[str]:
    words = {"town": _TOWNS.split(), "year": _YEARS, **_SLOTS}
    while True:
        name = f"{draw.choice(_FIRST_NAMES[gender].split())} {draw.choice(_SURNAMES.split())}"
        sentences = [draw.choice(_WORK[profession]), *draw.sample(_LIFE, draw.choice((1, 2))), draw.choice(_LEISURE)]
        filled = [
            sentence.format(name=name, **_PRONOUNS[gender], **{slot: draw.choice(words[slot]) for slot in words})
            for sentence in sentences
        ]
        yield " ".join(filled)


def write_dataset(folder: Path, n_train: int, n_test: int, seed: int = 0) -> None:
    """``train.jsonl`` and ``test.jsonl`` (hard_text, profession, gender) for load_dataset, shuffled.

    Args: n_train, n_test: texts of each profession and gender; none is in both.
    """
    splits: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for profession, number in PROFESSIONS.items():
        for gender, code in GENDERS.items():
            texts = biographies(profession, gender, n_train + n_test, seed)
            for split, part in (("test", texts[:n_test]), ("train", texts[n_test:])):
                splits[split] += [{"hard_text": text, "profession": number, "gender": code} for text in part]
    for split, rows in splits.items():
        random.Random(seed).shuffle(rows)
        with atomic_path(folder / f"{split}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
