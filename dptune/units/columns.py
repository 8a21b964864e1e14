"""Columns that name people. An epsilon per row promises little to a person with many rows.

So a run that protects rows refuses data with such a column, until its user says that rows are enough.
"""

from __future__ import annotations

import re
from functools import cache

# Names of user columns in published data sets, in lower case, letters and digits only: user_id and UserID are one.
_PEOPLE = (
    "account", "author", "client", "customer", "employee", "member", "owner", "participant", "patient", "person",
    "poster", "respondent", "reviewer", "sender", "speaker", "student", "subscriber", "user", "worker", "writer",
)  # fmt: skip
_ENDINGS = ("", "id", "name", "fullname", "email", "emailaddress", "hash", "key", "number", "uuid")
_NAMES = frozenset(
    [person + ending for person in _PEOPLE for ending in _ENDINGS]
    + ["annotatorid", "subjectid", "uid", "userids", "username", "nickname", "screenname", "realname", "handle"]
    + ["by", "createdby", "postedby", "submittedby", "writtenby", "email", "emailaddress", "phone", "phonenumber"]
    + ["ip", "ipaddress", "hashedip", "iphash", "deviceid", "ssn", "passportnumber"]
)


@cache
def names_users(column: str) -> bool:
    """Whether the name of a column says that it holds users. Such a name is safe to show.

    >>> names_users("User_ID"), names_users("title")
    (True, False)
    """
    return re.sub("[^a-z0-9]", "", column.lower()) in _NAMES
