"""Columns that name people. An epsilon per row promises little to a person with many rows.

So a run that protects rows refuses data with such a column, until its user says that rows are enough.
"""

from __future__ import annotations

import re
from functools import cache

_PEOPLE = frozenset((
    "account", "applicant", "asker", "author", "caller", "candidate", "client", "commenter", "contributor",
    "creator", "customer", "doctor", "donor", "employee", "learner", "login", "member", "nurse", "owner",
    "participant", "patient", "person", "poster", "questioner", "redditor", "respondent", "reviewer", "sender",
    "speaker", "student", "submitter", "subscriber", "tenant", "user", "username", "voter", "worker", "writer",
))  # fmt: skip
# What may follow the person in a name, as in `user_id_str`. Not `text` or `message`: those columns hold texts.
_ENDINGS = frozenset((
    "account", "address", "code", "email", "full", "fullname", "guid", "handle", "hash", "hashed", "id",
    "identifier", "idx", "key", "mail", "name", "no", "nr", "num", "number", "str", "uid", "url", "uuid",
))  # fmt: skip
_OTHERS_BEFORE = frozenset((
    "about", "by", "count", "for", "has", "is", "n", "nb", "no", "num", "number", "per", "to", "total", "with",
))  # fmt: skip
# People by themselves, or written in one word.
_NAMES = frozenset((
    "annotatorid", "by", "createdby", "deviceid", "email", "emailaddress", "guid", "handle", "hashedip", "iduser",
    "ip", "ipaddress", "iphash", "mail", "mrn", "nickname", "passportnumber", "patientno", "phone", "phonenumber",
    "postedby", "realname", "screenname", "ssn", "steamid", "subjectid", "submittedby", "uid", "writtenby",
))  # fmt: skip
_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


@cache
def names_users(column: str) -> bool:
    """Whether the name of a column says that it holds users. Such a name is safe to show.

    It does if, without endings such as `_id`, its last word is a kind of person: `tweet_author`, `userId`, `authors`.

    >>> names_users("User_ID"), names_users("from_user"), names_users("user_message"), names_users("num_users")
    (True, True, False, False)
    """
    words = [_singular(word.lower()) for word in _WORD.findall(column)]
    if "".join(words) in _NAMES:
        return True
    while words and (words[-1] in _ENDINGS or words[-1].isdigit()):
        words.pop()
    return bool(words) and _is_person(words[-1]) and not _OTHERS_BEFORE.intersection(words[:-1])


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def _is_person(word: str) -> bool:
    """Also where a person and an ending are written in one word, such as `userid`."""
    return word in _PEOPLE or any(word.removesuffix(ending) in _PEOPLE for ending in _ENDINGS if word.endswith(ending))
