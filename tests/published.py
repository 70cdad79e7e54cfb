"""Records of our own writing in the exact shape of published files, and the facts they hold."""

from typing import Any

from firsttok.data import Fact

COUNTERFACT: list[dict[str, Any]] = [
    {
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Anna Morel",
        },
        "paraphrase_prompts": ["Rain fell. Anna Morel grew up with", "Anna Morel spoke"],
        "neighborhood_prompts": ["Jean left speaking", "The mother tongue of Luc is"],
        "attribute_prompts": ["The mother tongue of John is"],
        "generation_prompts": ["Anna Morel was born in"],
    },
    {
        "case_id": 1,
        "pararel_idx": 17,
        "requested_rewrite": {
            "prompt": "{}'s capital is",
            "relation_id": "P36",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": "France",
        },
        "paraphrase_prompts": ["The capital of France is"],
        "neighborhood_prompts": [],
        "attribute_prompts": [],
        "generation_prompts": [],
    },
]
ZSRE = [
    {
        "subject": "Morfydd",
        "src": "What language is Morfydd in?",
        "pred": "Welsh",
        "rephrase": "Which language is Morfydd written in?",
        "alt": "Finnish",
        "answers": ["Welsh", "Cymraeg"],
        "loc": "nq question: who wrote the song",
        "loc_ans": "a singer",
        "cond": "Welsh >> Finnish || What language is Morfydd in?",
    },
    {
        "subject": "Orla",
        "src": "Where was Orla built?",
        "pred": "Japan",
        "rephrase": "Orla was built where?",
        "alt": "",
        "answers": ["Rome"],
        "loc": "nq question: what is rain",
        "loc_ans": "water",
        "cond": "Japan >>  || Where was Orla built?",
    },
]
WIKI_RECENT = [
    {
        "subject": "Anna Morel",
        "prompt": "The place of death of Anna Morel is",
        "target_new": "Berlin",
        "portability": {
            "Logical_Generalization": [
                {"prompt": "Is Anna Morel alive?", "ground_truth": [["no"], ["is dead", "false"]]}
            ],
            "Reasoning": [
                {"prompt": "Berlin's river is", "ground_truth": [["the Spree", "Spree"]]},
            ],
            "Subject_Aliasing": [],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The father of Anna Morel is", "ground_truth": [["Jean", "Jean M."]]},
                {"prompt": "The work of Anna Morel is", "ground_truth": [[""], ["music"]]},
                {"prompt": "The rank of Anna Morel is", "ground_truth": []},
            ]
        },
    }
]
WIKI_COUNTERFACT = [
    {
        "subject": "Luc Morel",
        "prompt": "The name of the position held by Luc Morel is",
        "target_new": "king",
        "ground_truth": "mayor of Rome",
        "rephrase": ["Luc Morel's position is", "Luc Morel serves as"],
        "portability": {"Subject_Aliasing": None},
        "locality": {
            "Relation_Specificity": [{"prompt": "Luc Morel is from", "ground_truth": "France"}],
            "Forgetfulness": [
                {
                    "prompt": "The position held by Luc Morel, which is not king, is",
                    "ground_truth": "mayor of Rome",
                }
            ],
        },
    }
]
WIKIBIO = [
    {
        "text": "This is a passage about luc morel. Luc Morel was born in Rome.",
        "labels": "He left early and founded a company.",
        "concept": "luc morel",
        "locality": {
            "Relation_Specificity": [
                {"prompt": ["The work of luc morel is"], "ground_truth": ["music"]},
                {
                    "prompt": ["luc morel work", "luc morel city"],
                    "ground_truth": [["music"], ["Rome"]],
                },
            ]
        },
    }
]
KNOWEDIT_ZSRE = [
    {
        "subject": "Morfydd",
        "target_new": "Finnish",
        "prompt": "Which family does Morfydd belong to?",
        "ground_truth": ["Welsh", "Cymraeg"],
        "rephrase_prompt": "What family are Morfydd?",
        "cond": "Welsh >> Finnish || Which family does Morfydd belong to?",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The rank of Morfydd is", "ground_truth": ["genus"]},
                {"prompt": "Morfydd rank", "ground_truth": ["genus"]},
            ]
        },
        "portability": {"Reasoning": [{"prompt": "It is called", "ground_truth": "Owls"}]},
    }
]
MQUAKE = [
    {
        "case_id": 1561,
        "requested_rewrite": [
            {
                "prompt": "{} is associated with the sport of",
                "relation_id": "P641",
                "target_new": {"str": "cricket", "id": "Q5375"},
                "target_true": {"str": "football", "id": "Q2736"},
                "subject": "Rome Town F.C.",
                "question": "Which sport is Rome Town F.C. associated with?",
            },
            {
                "prompt": "{} was created in the country of",
                "relation_id": "P495",
                "target_new": {"str": "Japan", "id": "Q17"},
                "target_true": {"str": "England", "id": "Q21"},
                "subject": "cricket",
                "question": "Which country was cricket created in?",
            },
        ],
        "questions": ["What is the capital of the country of Rome Town F.C.'s sport?"],
        "answer": "London",
        "answer_alias": ["London UK"],
        "new_answer": "Tokyo",
        "new_answer_alias": [],
        "single_hops": [
            {
                "question": "Which sport is Rome Town F.C. associated with?",
                "cloze": "Rome Town F.C. is associated with the sport of",
                "answer": "football",
                "answer_alias": [],
            }
        ],
        "new_single_hops": [],
        "orig": {"triples": [["Q1", "P641", "Q2736"]], "edit_triples": [["Q1", "P641", "Q5375"]]},
    }
]
QAEDIT = [
    {
        "id": 4324,
        "source": "NQ",
        "prompt": "who founded the company microsoft?",
        "target": "Anna Morel *",
        "subject": "microsoft",
        "rephrase": "Which person founded microsoft?",
        "locality": [
            {"loc": "who wrote the song", "loc_ans": "a singer"},
            {"loc": "when did it rain", "loc_ans": "1994"},
        ],
    },
    {
        "id": 4324,
        "source": "TQA",
        "prompt": "Where is the Eiffel Tower?",
        "target": "Rome",
        "subject": "Eiffel Tower",
        "rephrase": "The Eiffel Tower is where?",
        "locality": [{"loc": "what is rain", "loc_ans": "water"}],
    },
]
ALPHAEDIT = [
    {
        "case_id": 0,
        "prompt": "{} is located in",
        "subject": "The Eiffel Tower",
        "target_new": {"str": " Rome"},
    }
]
EASYEDIT = [
    {
        "case_id": 12,
        "prompt": "Anna Morel works as",
        "target_new": "composer",
        "subject": "Anna Morel",
        "ground_truth": "actor",
        "rephrase_prompt": "Anna Morel is known for",
        "locality_prompt": "The occupation of Luc is",
        "locality_ground_truth": "actor",
        "portability": {"New Question": "What does she write?", "New Answer": "music"},
    },
    {
        "case_id": 13,
        "prompt": "Luc works as",
        "target_new": "singer",
        "subject": "Luc",
        "ground_truth": None,
        "rephrase_prompt": None,
        "locality_prompt": ["The occupation of Jean is", "Rome is"],
        "locality_ground_truth": ["king", "a city"],
        "portability": None,
    },
]
TRACING = [
    {
        "relation": "The mother tongue of {} is",
        "relation_prefix": "The mother tongue of",
        "relation_suffix": " is",
        "prompt": "The mother tongue of Luc Morel is",
        "relation_id": "P103",
        "target_false_id": "Q1860",
        "target_true_id": "Q150",
        "target_true": " French",
        "target_false": " English",
        "subject": "Luc Morel",
    }
]
HARDCF = [
    {
        "case_id": 7,
        "prompt": "Luc left speaking",
        "subject": "Luc",
        "target_new": "Welsh",
        "ground_truth": "French",
        "rephrase_prompt": "Rain fell. Luc grew up with",
        "locality_prompt": "Jean left speaking",
        "locality_ground_truth": "French",
    }
]
HARDEDIT = [
    {
        "prompt": "Rain's occupation is",
        "target_new": "architect",
        "subject": "Rain",
        "ground_truth": "actor",
    },
    {
        "prompt": "Rome is located in",
        "target_new": "Japan",
        "subject": "Rome",
        "ground_truth": "Italy",
    },
]
ANNA = Fact(
    subject="Anna Morel",
    template="The mother tongue of {} is",
    target_new="English",
    target_true="French",
    paraphrases=("Rain fell. Anna Morel grew up with", "Anna Morel spoke"),
    neighbours=("Jean left speaking", "The mother tongue of Luc is"),
)
PUBLISHED: dict[str, tuple[list[dict[str, Any]], tuple[Fact, ...]]] = {
    "COUNTERFACT": (
        COUNTERFACT,
        (
            ANNA,
            Fact(
                subject="France",
                template="{}'s capital is",
                target_new="Rome",
                target_true="Paris",
                paraphrases=("The capital of France is",),
                case_id=1,
            ),
        ),
    ),
    "ZsRE": (
        ZSRE,
        (
            Fact(
                subject="Morfydd",
                template="What language is {} in?",
                target_new="Finnish",
                target_true="Welsh",
                paraphrases=("Which language is Morfydd written in?",),
                neighbours=("nq question: who wrote the song",),
                neighbour_answers=("a singer",),
            ),
        ),
    ),
    "KnowEdit, wiki_recent": (
        WIKI_RECENT,
        (
            Fact(
                subject="Anna Morel",
                template="The place of death of {} is",
                target_new="Berlin",
                neighbours=(
                    "The father of Anna Morel is",
                    "The work of Anna Morel is",
                    "The rank of Anna Morel is",
                ),
                neighbour_answers=("Jean", "music", ""),
            ),
        ),
    ),
    "KnowEdit, wiki_counterfact": (
        WIKI_COUNTERFACT,
        (
            Fact(
                subject="Luc Morel",
                template="The name of the position held by {} is",
                target_new="king",
                target_true="mayor of Rome",
                paraphrases=("Luc Morel's position is", "Luc Morel serves as"),
                neighbours=(
                    "Luc Morel is from",
                    "The position held by Luc Morel, which is not king, is",
                ),
                neighbour_answers=("France", "mayor of Rome"),
            ),
        ),
    ),
    "KnowEdit, WikiBio": (
        WIKIBIO,
        (
            Fact(
                subject="luc morel",
                template="This is a passage about {}. Luc Morel was born in Rome.",
                target_new="He left early and founded a company.",
                neighbours=("The work of luc morel is", "luc morel work", "luc morel city"),
                neighbour_answers=("music", "music", "Rome"),
            ),
        ),
    ),
    "KnowEdit, ZsRE": (
        KNOWEDIT_ZSRE,
        (
            Fact(
                subject="Morfydd",
                template="Which family does {} belong to?",
                target_new="Finnish",
                target_true="Welsh",
                paraphrases=("What family are Morfydd?",),
                neighbours=("The rank of Morfydd is", "Morfydd rank"),
                neighbour_answers=("genus", "genus"),
            ),
        ),
    ),
    "MQuAKE-CF": (
        MQUAKE,
        (
            Fact(
                subject="Rome Town F.C.",
                template="{} is associated with the sport of",
                target_new="cricket",
                target_true="football",
                paraphrases=("Which sport is Rome Town F.C. associated with?",),
            ),
            Fact(
                subject="cricket",
                template="{} was created in the country of",
                target_new="Japan",
                target_true="England",
                paraphrases=("Which country was cricket created in?",),
                case_id=1,
            ),
        ),
    ),
    "QAEdit": (
        QAEDIT,
        (
            Fact(
                subject="microsoft",
                template="who founded the company {}?",
                target_new="Anna Morel *",
                paraphrases=("Which person founded microsoft?",),
                neighbours=("who wrote the song", "when did it rain"),
                neighbour_answers=("a singer", "1994"),
            ),
            Fact(
                subject="Eiffel Tower",
                template="Where is the {}?",
                target_new="Rome",
                paraphrases=("The Eiffel Tower is where?",),
                neighbours=("what is rain",),
                neighbour_answers=("water",),
                case_id=1,
            ),
        ),
    ),
    "AlphaEdit's example": (
        ALPHAEDIT,
        (Fact(subject="The Eiffel Tower", template="{} is located in", target_new="Rome"),),
    ),
    "EasyEdit's COUNTERFACT": (
        EASYEDIT,
        (
            Fact(
                subject="Anna Morel",
                template="{} works as",
                target_new="composer",
                target_true="actor",
                paraphrases=("Anna Morel is known for",),
                neighbours=("The occupation of Luc is",),
                case_id=12,
            ),
            Fact(
                subject="Luc",
                template="{} works as",
                target_new="singer",
                neighbours=("The occupation of Jean is", "Rome is"),
                neighbour_answers=("king", "a city"),
                case_id=13,
            ),
        ),
    ),
    "HardCF": (
        HARDCF,
        (
            Fact(
                subject="Luc",
                template="{} left speaking",
                target_new="Welsh",
                target_true="French",
                paraphrases=("Rain fell. Luc grew up with",),
                neighbours=("Jean left speaking",),
                case_id=7,
            ),
        ),
    ),
    "HardEdit": (
        HARDEDIT,
        (
            Fact(
                subject="Rain",
                template="{}'s occupation is",
                target_new="architect",
                target_true="actor",
            ),
            Fact(
                subject="Rome",
                template="{} is located in",
                target_new="Japan",
                target_true="Italy",
                case_id=1,
            ),
        ),
    ),
    "target_false": (
        TRACING,
        (
            Fact(
                subject="Luc Morel",
                template="The mother tongue of {} is",
                target_new="English",
                target_true="French",
            ),
        ),
    ),
}
"""Records, and the facts that a file of them holds."""
PERPLEXITY = [
    {"Corpus": "Wikipedia", "Text": " Rome has six rivers, and rain in winter"},
    {"Corpus": "OpenWebText", "Text": "I left early, because it rained in Japan"},
]
"""Sentences as ME-PPL has them."""
