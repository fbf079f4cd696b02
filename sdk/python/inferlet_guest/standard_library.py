"""The modules that programs may import.

A component has no file system, so what is not imported when it is built cannot be imported later. Left out is what
needs threads, processes, sockets, a terminal or libraries that a guest does not have.
"""

from __future__ import annotations

from importlib import import_module

TEXT = "string re difflib textwrap unicodedata stringprep html html.parser html.entities pprint reprlib"
DATA = (
    "datetime calendar zoneinfo collections collections.abc heapq bisect array weakref types copy enum graphlib "
    "dataclasses struct codecs"
)
NUMBERS = "numbers math cmath decimal fractions random statistics colorsys"
FUNCTIONS = "itertools functools operator contextlib contextvars abc atexit typing annotationlib"
FORMATS = (
    "json json.decoder json.encoder csv configparser tomllib plistlib base64 binascii quopri mimetypes "
    "xml.etree.ElementTree xml.dom.minidom xml.sax xml.sax.saxutils "
    "email email.message email.parser email.policy email.mime.text"
)
FILES = (
    "io pathlib os os.path stat tempfile glob fnmatch shutil fileinput zlib gzip zipfile tarfile pickle shelve "
    "sqlite3"
)
SYSTEM = "sys sysconfig platform errno time argparse getopt logging logging.handlers warnings gc signal locale gettext"
CRYPTOGRAPHY = "hashlib hmac secrets uuid zlib"
CONCURRENCY = "asyncio concurrent.futures queue sched threading selectors"
INTERNET = (
    "urllib.parse urllib.request urllib.error urllib.robotparser http http.client http.cookies http.cookiejar "
    "ipaddress wsgiref.util"
)
LANGUAGE = (
    "ast tokenize token keyword inspect dis symtable compileall code codeop traceback linecache pkgutil importlib "
    "importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util runpy timeit "
    "unittest unittest.mock doctest pdb cProfile trace tracemalloc faulthandler builtins site"
)
PROGRAMS = "cmd shlex rlcompleter"
ENCODINGS = (
    "aliases ascii base64_codec charmap cp1250 cp1251 cp1252 cp437 cp850 hex_codec idna iso8859_1 iso8859_15 iso8859_2 "
    "iso8859_5 koi8_r latin_1 mac_roman palmos punycode quopri_codec raw_unicode_escape rot_13 undefined "
    "unicode_escape utf_16 utf_16_be utf_16_le utf_32 utf_32_be utf_32_le utf_7 utf_8 utf_8_sig zlib_codec"
)

GROUPS = (
    TEXT,
    DATA,
    NUMBERS,
    FUNCTIONS,
    FORMATS,
    FILES,
    SYSTEM,
    CRYPTOGRAPHY,
    CONCURRENCY,
    INTERNET,
    LANGUAGE,
    PROGRAMS,
)


def import_all() -> None:
    """Imports every module of the list; one that is missing fails the build."""
    for group in GROUPS:
        for name in group.split():
            import_module(name)
    for name in ENCODINGS.split():
        import_module(f"encodings.{name}")
