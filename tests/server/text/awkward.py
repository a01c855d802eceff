"""Texts on which tokenisers disagree when one of them is only nearly right."""

from __future__ import annotations

import itertools
import random

NUMBERS = [
    "0", "7", "42", "123", "1234", "12345", "123456", "1234567", "3.14159", "1,000,000", "1e-10", "0x1F",
    "007", "2024-01-31", "12:34:56", "+49 (30) 123456", "\u0661\u0662\u0663\u0664",
    "\u0967\u0968\u0969 \u0e51\u0e52", "\uff11\uff12\uff13", "\u00b2\u00b3\u00b9 \u00bd\u00bc\u00be",
    "x\u00b2+y\u00b3", "\u2160\u2161\u2162 \u2460\u2461", "\u4e00\u4e8c\u4e09", "\U0001d7d8\U0001d7d9",
    "1\u0301 2\u20e3", "a1b22c333d4444", "\u0bf0\u0bf1", "1 2  3   4",
]  # fmt: skip
EMOJI = [
    "\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd\U0001f44d\U0001f3ff", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "\u2764\ufe0f\u200d\U0001f525", "a\U0001f642b", " \U0001f680\U0001f680",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\u263a\ufe0e \u263a\ufe0f",
    "#\ufe0f\u20e3",
]  # fmt: skip
SCRIPTS = [
    "na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301", "\u1e9b\u0323",
    "\u0451\u0436\u0438\u043a \u0432 \u0442\u0443\u043c\u0430\u043d\u0435", "\u03bb\u03cc\u03b3\u03bf\u03c2",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c", "\u202eabc\u202c def",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0", "\u1230\u120b\u121d",
    "Hello\u4f60\u597dWorld\u043c\u0438\u0440", "\ufb01ne \ufb03x \u017fharp \u212a \u01c5",
    "e\u0301\u0302\u0303 o\u0308\u0332", "\u1100\u1161\u11a8 \uac01",
    "\uff28\uff45\uff4c\uff4c\uff4f\u3000\uff37\uff4f\uff52\uff4c\uff44",
    "I\u0307stanbul \u0131\u015f\u0131k", "\u00df \u1e9e", "it\u2019s \u201cquoted\u201d \u2014 so\u2026",
    "\U00020000\U0002a6d6", "\U00010330\U00010331", "\u0915\u094d\u0937\u093f",
    "Z\u0351\u036ba\u0363\u0368l\u0348\u0352g\u033c\u032bo\u0321",
]  # fmt: skip
SPACES = [
    " ", "  ", "   ", " " * 7, " " * 31, " " * 300, "\n", "\n\n", "\n\n\n", "\n" * 40, "\t", "\t\t",
    "\t\t\t\t\t", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", " \n \n ", "a\n\n\nb", "a \n b", "a\n  b", "a\t\tb",
    "  a", "   a  b   ", "a  ", "a\n", "a \n", "\u00a0a\u00a0", "\u2003x\u2002\u2009y", "\u200b\u200c\ufeff",
    "\u3000\u3000", "x\u0085y\u2028z\u2029", "\x0b\x0c", " \t \r\n \t", "a   \n\n   b",
]  # fmt: skip
SIGNS = [
    "!!!", "...", "....", "!@#$%^&*()", "a-b_c/d\\e", "<html>&amp;</html>", "\"'`\u00b4", "---\n===",
    "--------------------------------", "(((())))", "[[]]{{}}", "C++ C# F#", "$100 \u20ac50 \u00a320",
    "a.b,c;d:e", "e.g. i.e. U.S.A.", "I'm you're he'll they've we'd it's", "I'M YOU'RE HE'LL", "'s 't 're",
    "'\u017f \u2019s", "don''t", "''", "`$a+b=c`<d>|e^f~", "\u00a7\u00b6\u2020\u2022\u2192\u2212\u221e\u2248",
    "=====", "#######", "\u2500\u2500\u2500\u2502",
]  # fmt: skip
CODE = [
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}",
    "SELECT * FROM t WHERE a='b';", "#include <stdio.h>\r\nint main() { return 0; }\r\n",
    "\tif x:\n\t\t\tpass  # note", "camelCaseWords andHTTPServer XMLHttpRequest2",
    "snake_case_name __init__ CONSTANT_VALUE", "https://example.org/a?b=c&d=%20e#f",
    "user.name+tag@example.co.uk", "C:\\Users\\x\\file.txt", '{"key": [1, 2.5, null, "v\\u00e9"]}',
    "```python\nprint('hi')\n```", "a\u2192b \u2200x\u2208\u211d", "<|im_start|>user\nhi<|im_end|>",
]  # fmt: skip
SPECIAL = [
    "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "a<s>b", "x</s> y",
    "<s><s>", " <s> ", "[INST] hi [/INST]", "<|eot_id|>", "<|begin_of_text|>", "<start_of_turn>", "<0x41>",
    "<0x0A>\n", "<|end|> a", "<| endoftext |>", "<s", "</", "<mask>",
]  # fmt: skip
ODD = [
    "\0", "a\0b", "\x01\x02\x1b[0m\x7f", "\u0080\u009f", "\ue000\uf8ff", "\U000f0000\U0010fffd",
    "\ufffe\uffff", "\ufffd", "\u2581", "\u2581\u2581a", "a\u2581b", " \u2581 ", "\u0120hello \u0120",
    "\u010a\u0109", "a" * 300, "ab" * 200, "Donaudampfschifffahrtsgesellschaftskapit\u00e4n" * 3,
    "x" * 7 + "y" * 9, "aaaaaaaaaa", "1" * 100, "\u00e9" * 50, "\u4e2d" * 50, "\U0001f642" * 20, "!" * 100,
    "the the the the", "Hello World", " Hello World", "hello", "HELLO", "hElLo WoRlD",
]  # fmt: skip

PARTS = [*NUMBERS, *EMOJI, *SCRIPTS, *SPACES, *SIGNS, *CODE, *SPECIAL, *ODD]


def texts(joined: int = 400, seed: int = 7) -> list[str]:
    """Every part by itself, and `joined` random rows of them."""
    random_ = random.Random(seed)
    short = [part for part in PARTS if len(part) < 40]
    rows = ["".join(random_.choices(short, k=random_.randint(2, 5))) for _ in range(joined)]
    return ["", *PARTS, *rows]


def cuts(length: int) -> list[tuple[int, ...]]:
    """Sizes that sum to `length`: one by one, in twos, in threes, and at once."""
    return [
        tuple(min(size, length - at) for at in range(0, length, size))
        for size in itertools.chain((1, 2, 3), [max(1, length)])
    ]
