import pytest

from editlib.stats.wiki_markup import clean_wiki

# Nineteen words: one more makes a paragraph.
TAIL = "and this tail is here to make the sentence long enough that it counts as prose in our sense."


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Bold''' and ''italic'' words", "Bold and italic words"),
        ("''Title'''s cast, '''''both''''', '''X''''s own", "Title's cast, both, X's own"),
        ("a [[link]], a [[target page|label]]s, [[w:en:x|far]]", "a link, a labels, far"),
        ("[[File:a.jpg|thumb|A [[red]] [http://x.org fox] [[wolf|dog]]]]Text", "Text"),
        ("Text [[Category:Foxes]][[fr:Renard]]here [[:Category:Foxes|all]]", "Text here all"),
        ("see [http://x.org/y the site] or [//x.org]it", "see the site or it"),
        ("one<ref name=a/> two<ref>{{cite|u=x}}</ref> three<ref name=b>[[x]]\n</ref>", "one two three"),
        ("kept<!-- not [[kept]]\n at all --> text", "kept text"),
        ("Aa ({{IPAc-en|e}}; {{lang-fr|b}}) bb", "Aa bb"),
        ("Aa ({{IPAc-en|e}}, or Ab) bb {{citation needed|date={{MONTH}}}}, cc", "Aa (or Ab) bb, cc"),
        ("at {{convert|5|to|10|km|mi|abbr=on}}, {{convert|1,200.5|sqmi}}", "at 5 to 10 km, 1,200.5 sq mi"),
        ("the {{lang|de|Bund}} in {{nowrap|New York}}", "the Bund in New York"),
        ("CO<sub>2</sub>, 10<sup>−6</sup>, 19<sup>th</sup><br />line", "CO2, 10⁻⁶, 19th line"),
        ("a&nbsp;b &ndash; c &amp;  d", "a b – c & d"),
    ],
)
def test_markup_becomes_words(markup, expected):
    assert clean_wiki(f"{markup} {TAIL}") == [f"{expected} {TAIL}"]


def test_a_page_keeps_only_its_prose():
    page = f"""{{{{Infobox|name={{{{small|x}}}}
| text = It {TAIL}
}}}}
__NOTOC__
It begins {TAIL}
== A heading {TAIL} ==
* An item {TAIL}
:An indented line {TAIL}
{{| class="wikitable"
|-
| A cell {TAIL}
{{|
| an inner cell {TAIL}
|}}
| after the inner table {TAIL}
A cell's second line {TAIL}
|}}
Too short to count.
It ends without a stop {TAIL[:-1]}
It leads to a list {TAIL[:-1]}:
<blockquote>It is quoted "{TAIL}"</blockquote>"""
    assert clean_wiki(page) == [f"It begins {TAIL}", f'It is quoted "{TAIL}"']


@pytest.mark.parametrize(
    "hole",
    [
        "<math>x^2</math>",
        "<gallery>a.jpg</gallery>",
        "{{val|3|e=5}}",
        "{{convert|many|km}}",
        "{{unclosed",
        "[[unclosed",
        "http://x.org/",
    ],
)
def test_a_paragraph_with_a_hole_is_dropped(hole):
    assert clean_wiki(f"It is {hole} here {TAIL}\n\nIt is whole {TAIL}") == [f"It is whole {TAIL}"]


def test_twenty_words_is_the_border():
    assert clean_wiki(f"Twenty {TAIL}") == [f"Twenty {TAIL}"]
    assert clean_wiki(TAIL.capitalize()) == []


@pytest.mark.parametrize("text", ["#REDIRECT [[Other]]", "  #redirect[[Other]]", ""])
def test_redirects_and_empty_pages_hold_no_prose(text):
    assert clean_wiki(f"{text}\nIt is here {TAIL}" if text else "") == []


def test_hostile_markup_ends_soon():
    assert clean_wiki("{{" * 5000 + "[[" * 5000 + "{|" * 5000 + "'" * 5000 + "<ref>" * 2000) == []
