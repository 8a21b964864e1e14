"""The engine where users of other training libraries are; each module needs the library that it is named after."""
