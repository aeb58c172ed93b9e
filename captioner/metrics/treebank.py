r"""The tokens that coco-caption scores: those of Stanford's PTBTokenizer, without punctuation.

The lexer is a table of rules. A rule matches a token and its context, the text that must follow.
Of all rules that match at an index, the longest match wins, context included; of equally long ones
the first rule. The vocabulary has another tokenizer (:mod:`captioner.data.tokenizer`). This one
splits as the figures of the literature were made, oddities such as "-lrb-" for a bracket included.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

__all__ = ["check_captions", "tokenize"]

_PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_WITHIN = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))  # would end a line there

# The usual words; what the rules make of one of them depends on no neighbour.
_USUAL = re.compile(r"([A-Za-z]+|,(?= )|\.(?=\n|\Z))(?=[ \n]|\Z)| [ \t\xA0\u2000-\u200A\u3000]*")
_SPLIT = re.compile(r"cannot|gonna|wanna|gotta|lemme|gimme", re.IGNORECASE)

_SPACE = r"[ \t\xA0\u2000-\u200A\u3000]"
_BLANK = r"[ \t\xA0\u2000-\u200A\u3000\n\x85]"
_ASTRAL = r"\U00010000-\U0010FFFF"
_NUMERALS = "".join(
    c for c in map(chr, range(0x10000)) if c.isalnum() and unicodedata.category(c) in ("No", "Nl")
)
_ALPHA = rf"[^\W\d_{_ASTRAL}{_NUMERALS}]"
_ALNUM = rf"[^\W_{_ASTRAL}{_NUMERALS}]"
_DIGIT = rf"(?![{_ASTRAL}])\d"
# The soft hyphen, and the marks that are part of a word.
_MARKS = (
    r"\xAD\u02C2-\u02C5\u02D2-\u02DF\u02E5-\u02EB\u02ED\u02EF-\u036F\u0375\u0378\u0379\u0384\u0385"
    r"\u03F6\u0483-\u0487\u055A-\u055F\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7"
    r"\u0615-\u061A\u064B-\u065E\u0670\u06D6-\u06E4\u06E7-\u06ED\u06FD\u06FE\u070F\u0711"
    r"\u0730-\u074C\u07A6-\u07B0\u07EB-\u07F3\u0900-\u0903\u093C\u093E-\u094E\u0951-\u0955"
    r"\u0962\u0963\u0981-\u0983\u09BC\u09BE-\u09C4\u09C7\u09C8\u09CB-\u09CD\u09D7\u09E2\u09E3"
    r"\u0A01-\u0A03\u0A3C\u0A3E-\u0A4F\u0A81-\u0A83\u0ABC\u0ABE-\u0ACF\u0B82\u0BBE-\u0BC2"
    r"\u0BC6-\u0BC8\u0BCA-\u0BCD\u0C01-\u0C03\u0C3E-\u0C56\u0D3E-\u0D44\u0D46-\u0D48\u0E31"
    r"\u0E34-\u0E3A\u0E47-\u0E4E\u0EB1\u0EB4-\u0EBC\u0EC8-\u0ECD\u1885\u1886"
)
_LETTER = rf"(?:{_ALPHA}|[{_MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_WORD = rf"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_APOSTROPHE = r"(?:['\x92\u2019]|(?i:&apos;))"
_ANY_APOSTROPHE = r"(?:['\x92\u2019\x91\u2018\u201B`]|(?i:&apos;))"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = rf"(?i:n){_ANY_APOSTROPHE}(?i:t)"
_AMPERSAND = r"(?i:&amp;)"
_PAUSE = r"[,;:\u3001]"
_NUMBER = rf"[-+]?(?:{_DIGIT}*(?:[.:,\xAD\u066B\u066C](?:{_DIGIT})+)+|(?:{_DIGIT})+)"
_TAG = (
    r"<(?:[!?][A-Za-z-][^>\r\n]*|[A-Za-z][\w:.-]*(?:[ ]+(?:[A-Za-z][\w:.-]*[ ]*=[ ]*"
    r"(?:'[^'\r\n]*'|\"[^\"\r\n]*\")|[A-Za-z][\w:.-]*))*[ ]*/?|/[A-Za-z][\w:.-]*)[ ]*>"
).replace(r"\w", "A-Za-z0-9_")

_NATION = r"(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])"
_BEFORE_SMALL = (
    r"(?i:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu(?:rs)?|Fri"
    r"|Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn"
    r"|Tenn|Va|Vt|Wisc?|Wyo|Inc|Cos?|Corp|Pp?t(?-i:[ye])s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl"
    r"|Sys|tel|est|ext|sq|Jr|Sr|Bros|(?:Ed|Ph)\.D|Esq|etc|al|seq|Bldg|Blvd|Rd)"
    r"|A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
_BEFORE_CAPITAL = (
    r"(?i:Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt"
    r"|Capt|Ste?|Ave|Pres|Lieut|Rt|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens"
    r"|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl"
    r"|M(?-i:[ft])g|Dept)|M(?i:iss)"
)
_BEFORE_NUMBER = r"(?i:ca|figs?|prop|nos?|art|bldg|pp|op)"
# After "C." these words begin a sentence, so that the full stop is not the letter's.
_STARTERS = (
    r"(?:A(?i:bout|ccording|dditionally|fter|n|s|t)?|But|E(?i:arlier)|H(?i:e|er|ere|owever)"
    r"|I(?i:f|n|t)|L(?i:ast)|M(?i:any|ore|r\.|s\.)|N(?i:ow)|O(?i:nce|ne|ther|ur)"
    r"|S(?i:he|ince|o|ome|uch)|T(?i:hat|he|hen|here|hese|hey|his)|W(?i:e|hen|hile|hat)|Y(?i:et|ou))"
).replace("But", "B(?i:ut)")

_ELISION = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?"
_HYPHENED = rf"{_ELISION}{_ALNUM}+(?:[-_\u058A\u2010\u2011]{_ELISION}{_ALNUM}+)*"
_SHORT_HYPHENED = (
    rf"[A-Za-z0-9][A-Za-z0-9.,\xAD]*(?:-(?:{_NATION}\.|{_INITIALS}+\.|[A-Za-z0-9\xAD]+))+"
)
_JOINED = rf"[A-Z]+(?:(?:{_AMPERSAND}|[+&])[A-Z]+)+"
_ENDING = (
    r"(?i:bat|bmp|class|cgi|cpp|c|dll|docx|doc|exe|gif|gz|html|htm|h|jar|java|jpeg|jpg|mov|mp3|pdf"
    r"|php|pl|png|pptx|ppt|ps|py|sql|tar|txt|wav|xml|x|zip|wm[va])"
)
_HOST = r"[^ \t\n\f\r\"<>|.!?(){},]+\."
_BARE_HOST = r"[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\."  # there, too, it is a range from , to _
_PATH = r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?"
_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_SYMBOLS = (
    r"+&~^|\\%\xA1\xA6-\xA9\xAC\xAE-\xB1\xB4\xB6-\xB8\xBF\xD7\xF7\u037E\u0387\u0589\u05BE\u05C0"
    r"\u05C3\u05C6\u05F3\u05F4\u0600-\u0603\u0606-\u060A\u060C\u0614\u061B\u061E\u061F\u066A\u066D"
    r"\u06D4\u0700-\u070D\u07F6-\u07F8\u0964\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023"
    r"\u2030-\u2038\u203B\u203E-\u2042\u2044\u207A-\u207E\u208A-\u208E\u2100\u2101\u2103-\u2106"
    r"\u2108\u2109\u2114\u2116-\u2118\u211E-\u2123\u2125\u2127\u2129\u212E\u213A\u213B"
    r"\u2140-\u2144\u214A-\u214D\u214F\u2190-\u2BFF\u3002\u3012\u30FB\uFF01-\uFF0F\uFF1A-\uFF20"
    r"\uFF3B-\uFF40\uFF5B-\uFF65"
)
_QUOTES = str.maketrans(
    dict.fromkeys("\x91\u2018\u201b\u2039", "`")
    | dict.fromkeys("\x92\u2019\u203a", "'")
    | dict.fromkeys("\x93\u201c\xab", "``")
    | dict.fromkeys("\x94\u201d\xbb", "''")
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ROUND = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_CURRENCY = {"\xa2": "cents", "\xa3": "#"} | dict.fromkeys("\x80\xa4\u20a0\u20ac", "$")
_FRACTIONS = {"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3"}


def _soft(text: str) -> str:
    return text.replace("\xad", "") or "-"


def _quotes(text: str) -> str:
    text = text.replace("&apos;", "'").replace('"', "''").replace("&quot;", "''")
    return text.translate(_QUOTES)


def _opening_quotes(text: str) -> str:
    return _quotes(text.replace("&quot;", "``").replace('"', "``").replace("'", "`"))


def _unbroken(text: str) -> str:
    return text.replace(" ", "\xa0")


def _ampersand(text: str) -> str:
    return re.sub(_AMPERSAND, "&", text)


class _Rule(NamedTuple):
    """The patterns of a token and of its context, and the function that writes the token."""

    token: str
    context: str = ""
    write: Callable[[str], str] = str


# Rules whose tokens are punctuation are here because they win over other rules.
_RULES = (
    _Rule(r"[cC]\+\+|(?i:[cf])#"),
    _Rule(r"(?i:can)", "(?i:not)"),
    _Rule("'(?i:t)", "(?i:was|is)"),
    _Rule(r"(?i:gon|wan)", "(?i:na)"),
    _Rule(r"(?i:got)", "(?i:ta)"),
    _Rule(r"(?i:lem|gim)", "(?i:me)"),
    _Rule(_TAG, write=_unbroken),
    _Rule(r"(?i:&(?:MD|mdash|ndash);)|[\x96\x97\u2013-\u2015]", write=lambda _: "--"),
    _Rule(_AMPERSAND, write=_ampersand),
    _Rule(r"(?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)"),
    _Rule(_WORD, _CLITIC, _soft),
    _Rule(r"[A-Za-z\xAD]*[A-MO-Za-mo-z]\xAD*", _NOT, _soft),
    _Rule(_WORD, write=_soft),
    _Rule(rf"{_APOSTROPHE}(?i:n){_APOSTROPHE}?"),
    _Rule(rf"[lLdDjJ]{_APOSTROPHE}|(?i:Dunkin|somethin|ol){_APOSTROPHE}"),
    _Rule(rf"{_APOSTROPHE}(?:(?i:em|till?|cause)|[2-9]0(?i:s))"),
    _Rule(rf"[A-HJ-XZn]{_ANY_APOSTROPHE}{_ALPHA}{{2,}}"),
    _Rule(rf"{_ALPHA}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_ALPHA}*"),
    _Rule(r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"),
    _Rule(rf"(?i:o){_ANY_APOSTROPHE}(?i:o)"),
    _Rule(rf"(?i:y){_APOSTROPHE}", _ALPHA),
    # One character beyond the BMP is two to Java.
    _Rule(
        r"(?i:https?)://(?:[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]"
        rf"|[{_ASTRAL}])"
    ),
    _Rule(rf"(?i:www)\.(?:{_HOST})+[a-zA-Z]{{2,4}}{_PATH}"),
    _Rule(rf"(?:{_BARE_HOST})+(?i:com|net|org|edu){_PATH}"),
    _Rule(
        r"(?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\xA0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\xA0]+\.)*"
        r"[^ \t\n\f\r\"<>|(){}.\xA0]+(?:(?i:&gt;)|>)?"
    ),
    _Rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+"),
    _Rule(rf"{_CLITIC}|{_NOT}", r"[^A-Za-z]", _quotes),
    _Rule(rf"(?:{_DIGIT}){{1,2}}[-/](?:{_DIGIT}){{1,2}}[-/](?:{_DIGIT}){{2,4}}"),
    _Rule(_NUMBER, write=_soft),
    _Rule(r"[\u207A\u207B\u208A\u208B]?(?:[\u2070\xB9\xB2\xB3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _Rule(
        rf"(?:(?:{_DIGIT}){{1,4}}[- \xA0])?(?:{_DIGIT}){{1,4}}(?:\\?/|\u2044)(?:{_DIGIT}){{1,4}}",
        write=_unbroken,
    ),
    _Rule(r"[\xBC-\xBE\u2153-\u215E]", write=lambda text: _FRACTIONS.get(text, text)),
    _Rule(
        r"(?i:-[LR][RCS]B-|C\.D\.s|pro-|anti-|S(?:&|&amp;)(?:P-500|Ls))"
        rf"|(?i:Cap){_APOSTROPHE}(?i:n)|(?i:c){_APOSTROPHE}(?i:est)",
        write=_ampersand,
    ),
    _Rule(rf"{_PART}(?:\\?/{_PART}){{1,2}}"),
    _Rule(r"[A-Z]*\$|#"),
    _Rule(
        r"[\x80\xA2-\xA5\u060B\u0E3F\u20A0\u20A4\u20AC\uFFE0\uFFE1\uFFE5\uFFE6]",
        write=lambda text: _CURRENCY.get(text, text),
    ),
    _Rule(r"[A-Za-z]", rf"\.{_BLANK}+(?:{_STARTERS}|{_TAG}){_BLANK}"),
    _Rule(rf"{_BEFORE_NUMBER}\.", rf"{_BLANK}?{_DIGIT}"),
    _Rule(r"(?i:pt(?-i:[eyEY])|co)\.", rf"{_SPACE}(?i:ltd|lim)"),
    _Rule(rf"(?:{_BEFORE_SMALL})\.", r"(?s:..)?"),
    _Rule(rf"(?:{_BEFORE_CAPITAL})\."),
    _Rule(rf"(?:{_NATION}|{_INITIALS}*)\."),
    _Rule(_NATION, _BLANK),
    _Rule(rf"{_APOSTROPHE}[0-9][0-9]", _BLANK),
    _Rule(
        rf"(?:{_LETTER}|{_DIGIT})+(?:\.(?:{_LETTER}|{_DIGIT})+)*\.{_ENDING}",
        rf"(?:{_BLANK}|[.?!,])",
    ),
    _Rule(rf"{_WORD}\.", _PAUSE, _soft),
    _Rule(
        r"(?:\([0-9]{2,3}\)[ \xA0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xA0])?[0-9]{2,4}[- \xA0])"
        r"[0-9]{3,4}[- \xA0]?[0-9]{3,5}"
        r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        write=lambda text: _unbroken(text).translate(_ROUND),
    ),
    _Rule(r"\"|(?i:&quot;)", r"[A-Za-z0-9$]", _opening_quotes),
    _Rule(r"\"|(?i:&quot;)", write=_quotes),
    _Rule(r"<|(?i:&lt;)", write=lambda _: "<"),
    _Rule(r">|(?i:&gt;)", write=lambda _: ">"),
    _Rule(
        r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", r"[^A-Za-z0-9]", lambda text: text.translate(_ROUND)
    ),
    _Rule(
        r"[\^x=~<>]\.\[\^[xX]=[^< \n]*<>\]|[-^x=~<>']_[-^x=~<>']"
        r"|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        write=lambda text: text.translate(_ROUND),
    ),
    _Rule(r"[()\[\]{}]", write=_BRACKETS.__getitem__),
    _Rule(r"-+", write=lambda text: "--" if len(text) in (3, 4) else text),
    _Rule(r"\.{3,5}|(?:\.[ \xA0]){2,4}\.|[\x85\u2026]", write=lambda _: "..."),
    _Rule(r"@+|#+|_+|\*+|(?:\\\*){1,3}|[?!]+|[=/]"),
    _Rule(_PAUSE),
    _Rule(r"[.\xA1\xBF\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002]"),
    _Rule(rf"{_SHORT_HYPHENED}\.", _PAUSE, _soft),
    _Rule(_SHORT_HYPHENED, write=_soft),
    _Rule(rf"{_HYPHENED}\.", _PAUSE),
    _Rule(_HYPHENED),
    _Rule(rf"{_JOINED}\.", _PAUSE, _ampersand),
    _Rule(_JOINED, write=_ampersand),
    _Rule("'", r"[A-Za-z][^ \t\n\r\xA0]", _opening_quotes),
    _Rule(rf"{_CLITIC}|{_NOT}", write=_quotes),
    _Rule(
        r"''|[`\u2018-\u201F\x91-\x94\u2039\u203A\xAB\xBB]{1,2}|(?i:&apos;)|['\x92]", write=_quotes
    ),
    _Rule(r"<<|>>"),
    _Rule(rf"[{_SYMBOLS}]"),
    _Rule(rf"{_SPACE}+|(?i:&nbsp;)", write=lambda _: ""),
)


@cache
def _compiled() -> list[tuple[re.Pattern[str], Callable[[str], str]]]:
    return [(re.compile(f"({rule.token}){rule.context}"), rule.write) for rule in _RULES]


def _next(text: str, start: int) -> tuple[int, str]:
    """Return the end of the token at ``start``, and the token; "" where a character is skipped."""
    furthest, end, write = start, start + 1, None
    for pattern, writer in _compiled():
        match = pattern.match(text, start)
        if match is not None and match.end() > furthest:
            furthest, end, write = match.end(), match.end(1), writer
    return end, write(text[start:end]) if write else ""


def _tokens(text: str, start: int, stop: int) -> list[str]:
    tokens = []
    while start < stop:
        usual = _USUAL.match(text, start)
        if usual and not _SPLIT.fullmatch(usual[0]):
            start, token = usual.end(), usual[1]
        else:
            start, token = _next(text, start)
        if token:
            tokens.append(token.lower())
    if tokens:
        tokens[-1] = tokens[-1].rstrip()  # as coco-caption does with each line
    return [token for token in tokens if token not in _PUNCTUATION]


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    r"""Split each caption into the lower-case tokens that coco-caption would score.

    The tokens are those of Stanford CoreNLP 3.4.1's PTBTokenizer with ``-preserveLines
    -lowerCase``, without coco-caption's punctuation. As in coco-caption, the captions are the lines
    of one text: whether the full stop of "vitamin C." is part of the last word depends on the
    beginning of the next line. A token may hold a non-breaking space ("1 1/2").

    Two differences are meant. A line separator within a caption (\r, \v, \f, U+2028, U+2029) is a
    space here; in coco-caption it moves all later captions to other images. Letters that Unicode
    gained since 2012 are letters here.
    """
    lines = [caption.translate(_WITHIN) for caption in captions]
    text = "\n".join(lines)
    tokens, start = [], 0
    for line in lines:
        tokens.append(_tokens(text, start, start + len(line)))
        start += len(line) + 1
    return tokens


def check_captions(captions: Sequence[str], kind: str) -> None:
    """Raise ``TypeError`` for a value that is no list of strings; ``kind`` names one of them."""
    if isinstance(captions, str):
        raise TypeError(f"the {kind}s are one string, {captions!r}")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"{kind} {index} is {caption!r}; a caption is a string")
