"""Verdicts on answers in other scripts and languages, judged by hand."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.answers import has_answer, is_fluent_refusal, is_refusal, main_script, refusal_verdict


@pytest.mark.parametrize(
    ("text", "answer", "there"),
    [
        ("中国的首都是北京。", "北京", True),
        ("北京市是首都", "北京", True),
        ("法國的首都是巴黎。", "法国", True),
        ("法国的首都是巴黎。", "法國", True),
        ("他在電腦上聽音樂。", "电脑", True),
        ("頭髮很長", "头发", True),
        ("發展很快", "发展", True),
        ("他住在臺灣", "台湾", True),
        ("國立台湾大学", "国立臺灣大學", True),
        ("他坐計程車", "出租车", False),  # another word, not another form of its characters
        ("龍は国にいる", "竜", False),
        ("首都は東京です。", "東京", True),
        ("トヨタはアイチケンにあります", "アイチケン", True),
        ("수도는 서울입니다.", "서울", True),
        ("เมืองหลวงคือกรุงเทพมหานครครับ", "กรุงเทพมหานคร", True),
        ("他用Apple手机", "Apple", True),
        ("他用Pineapple手机", "apple", False),
        ("生于1945年", "1945", True),
        ("生于1945年", "45年", False),
        ("ภาษาไทย", "ไท", True),
        ("เขาชื่อกี่", "ก", False),  # the vowel sign belongs to the letter
        ("ดื่มน้ำ", "น\u0e4d\u0e49า", True),  # the ring of the am before the tone
        ("ດື່ມນ້ຳ", "ນ\u0ecd\u0ec9າ", True),
        ("그는 파리에서 태어났다", "파리", True),
        ("राजधानी दिल्ली है", "दिल्ली", True),
        ("राजधानी दिल्ली है", "दिल्ल", False),
        ("Москва - столица", "Москва", True),
        ("Москвариум", "Москва", False),
        ("It is Sana\u2019a.", "Sana'a", True),
        ("It is Sana'a.", "Sana\u2019a", True),
        ("C++11 came later", "C++", False),
        ("cafe\u0301s", "cafe", False),
        ("首都はＰａｒｉｓです", "Paris", True),
        ("１９４５年", "1945", True),
        ("１９４５年", "45", False),
        ("ﾄｳｷｮｳにある", "トウキョウ", True),
        ("H₂O", "H2O", True),
        ("10² m", "102", False),
        ("\ufb01nland", "Finland", True),
        ("Hawai\u02bbi", "Hawai'i", True),
        ("\u05e6\u05d4\u05f4\u05dc", '\u05e6\u05d4"\u05dc', True),
        ("هي القَاهِرَة.", "القاهرة", True),
        ("القـــاهرة", "القاهرة", True),
        ("القاهرة", "القَاهِرَة", True),
        ("יְרוּשָׁלַיִם", "ירושלים", True),
        ("ท\u0e4d\u0e32", "ทำ", True),  # the vowel am in two pieces, or in one
        ("นำ", "น", False),
        ("BAHNHOFSTRASSE", "Bahnhofstraße", True),
        ("Die Bahnhofstrasse in Zürich", "Bahnhofstraße", True),
        ("in Gießen", "Giessen", True),
        ("Großbritannien", "groß", False),
        ("İstanbul'da", "istanbul", True),
        ("DIYARBAKIR", "Diyarbakır", True),
        ("Başkent ANKARA'dır", "Ankara", True),
        ("फ़्रांस", "फ\u093c्रांस", True),
        ("ΘΕΌΣ", "Θεός", True),
        ("New\u00a0York", "New York", True),
        ("in New\n  York today", "New York", True),
        ("NewYork", "New York", False),
        ("Saint\u2011Étienne", "Saint-Étienne", True),
        ("−5 °C", "-5", True),
        ("1939\u20131945", "1939-1945", True),
        ("It is _Paris_.", "Paris", True),
        ("__New York__", "New York", True),
        ("paris_hotel", "Paris", False),
        ("İstanbul'da", "istanbul", True),
        ("ΑΘΗΝΑΣ", "Αθηνας", True),
        ("约翰\u2022列侬", "约翰\u00b7列侬", True),
        ("١٩٤٥", "1945", True),
        ("१९४७ में", "1947", True),
        ("ปี ๑๙๔๕", "1945", True),
        ("بالقاهرة", "القاهرة", True),
        ("للقاهرة", "القاهرة", True),
        ("وبباريس", "باريس", True),
        ("مبيروت", "بيروت", False),
        ("احمد", "أحمد", True),
        ("القاهره", "القاهرة", True),
        ("הוא גר בירושלים", "ירושלים", True),
        ("קירושלים", "ירושלים", False),
        ("शहर हिन्दी", "हिंदी", True),
        ("जन्म", "जंम", False),
        ("Khánh Hòa", "Khánh Hoà", True),
        ("THUỶ", "thủy", True),
        ("hoán", "hóan", False),
        ("\u00d0à Nẵng", "Đà Nẵng", True),
        ("3.14", "3", False),
        ("It is 3.", "3", True),
        ("1,400 m", "400", False),
        ("1,400 m", "1,400", True),
        ("am 12.5.1990", "1990", True),
        ("٣٫١٤", "3.14", True),
    ],
)
def test_has_answer_in_scripts(text, answer, there):
    for form in ("NFC", "NFD"):
        assert has_answer(unicodedata.normalize(form, text), [answer]) is there
        assert has_answer(text, [unicodedata.normalize(form, answer)]) is there


@given(
    st.sampled_from(["São Paulo", "Curaçao", "Malmö", "Åland", "Łódź", "서울", "が", "Việt Nam", "Ἀθῆναι"]), st.data()
)
def test_accents_may_be_composed_or_not(answer, data):
    forms = st.sampled_from(["NFC", "NFD"])
    text = unicodedata.normalize(data.draw(forms), f"It is {answer}, they say.")
    assert has_answer(text, [unicodedata.normalize(data.draw(forms), answer)])


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("Я живу в Москве.", "Москва", True),
        ("w Warszawie", "Warszawa", True),
        ("Pariisissa asuu", "Pariisi", True),
        ("в Новой Зеландии", "Новая Зеландия", True),
        ("Ankaralıyım", "Ankara", False),  # five letters more than the three that are allowed
        ("Pariser Leben", "Paris", True),
        ("Chad", "Cha", False),
        ("Parish priests of Rome", "Romeo", False),
    ],
)
def test_inflected_endings_by_an_option(text, answer, found):
    assert has_answer(text, [answer], endings=3) is found
    assert not has_answer(text, [answer])


REFUSALS = [
    "Je ne sais pas.", "Je n\u2019en ai aucune idée.", "J'ignore la réponse à cette question.",
    "Ich weiß es leider nicht.", "Ich bin mir nicht sicher.", "Keine Ahnung, das weiß ich nicht.",
    "Das kann ich leider nicht sagen.", "No lo sé.", "No estoy seguro de eso.", "Lo siento, no tengo esa información.",
    "Non lo so.", "Non sono sicuro della risposta.", "Não sei a resposta.", "Ik weet het niet.", "Nie wiem tego.",
    "Bunu bilmiyorum.", "Saya tidak tahu jawabannya.", "Tôi không biết điều đó.", "Я не знаю ответа.",
    "Я этого не знаю.",
    "Не знаю, что сказать.", "Я не знаю цього.", "我不知道。", "抱歉，我无法回答这个问题。", "對不起，我不清楚。",
    "わかりません。", "申し訳ありませんが、お答えできません。", "잘 모르겠습니다.", "죄송하지만 알 수 없습니다.",
    "ฉันไม่ทราบคำตอบ", "ขอโทษค่ะ ไม่แน่ใจ", "لا أعرف الجواب.", "من نمی دانم.", "אני לא יודע.", "मुझे नहीं पता।",
    "Δεν γνωρίζω την απάντηση.", "I don\u2019t know that.",
    "I'm sorry. I can't answer that.", "죄송합니다. 그 질문에는 답할 수 없습니다.", "抱歉。我不知道。",
    "这个问题我答不上来。", "答えられません。", "Üzgünüm, bu soruya cevap veremem.",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_in_other_languages(text):
    for form in ("NFC", "NFD"):
        assert is_refusal(unicodedata.normalize(form, text))


@pytest.mark.parametrize(
    "text",
    [
        "La capitale de la France est Paris.", "Die Hauptstadt von Frankreich ist Paris.",
        "Es ist nicht weit von Bonn.",
        "La capital de Francia no es Madrid, es París.", "La capitale non è Milano ma Roma.",
        "Столица России - Москва.",
        "中国的首都是北京。", "首都は東京です。", "수도는 서울입니다.", "เมืองหลวงคือกรุงเทพ",
        "العاصمة هي القاهرة في مصر.",
        "Paris", "", "Sorry, Paris. I do not know more.", "抱歉，是北京。我不知道更多。",
    ],
)  # fmt: skip
def test_answers_in_other_languages_are_no_refusals(text):
    assert refusal_verdict(text) is False


@pytest.mark.parametrize("text", ["მე არ ვიცი პასუხი", "Ես չգիտեմ պատասխանը", "Nem tudom megmondani önnek sajnos"])
def test_a_language_that_is_not_known_is_not_judged(text):
    assert refusal_verdict(text) is None
    assert is_refusal(text) is False


@pytest.mark.parametrize(
    ("text", "fluent"),
    [
        ("我不知道。", True),
        ("我不知道", False),
        ("我不知道我不知道。", False),
        ("わかりません。わかりません。", False),
        ("ฉันไม่ทราบคำตอบ", True),
        ("मुझे यह नहीं पता।", True),
        ("Je ne sais pas.", True),
        ("잘 모르겠습니다.", True),
        ("모르겠습니다 모르겠습니다.", False),
        ("Bilmiyorum.", True),
        ("No sé.", True),
        ("Не знаю.", True),
        ("نمی\u200cدانم.", True),
        ("Non so so.", False),
        ("No idea.", False),
    ],
)
def test_fluency_in_scripts(text, fluent):
    assert is_fluent_refusal(text) is fluent


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Paris", "LATIN"),
        ("北京 is", "CJK"),
        ("東京です", "JAPANESE"),
        ("서울", "HANGUL"),
        ("12!", None),
        ("Ｐａｒｉｓ", "LATIN"),
    ],
)
def test_main_script(text, script):
    assert main_script(text) == script


@pytest.mark.parametrize("text", ["10 x 10 = 100.", "a + b = c + d", "1, 2, 3, 4, 5 km", "x1 y2 z3 w4 v5"])
def test_digits_and_symbols_are_of_no_unknown_language(text):
    assert refusal_verdict(text) is False
