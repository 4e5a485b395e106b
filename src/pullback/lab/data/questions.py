"""Questions of arithmetic and of common sense, each with a bare, a short and a detailed right answer.

Written for the study of a language model's gradients. All bare answers differ, so that an answer that is
given to another question is a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with three right answers.

    Args:
        ask: the question.
        none: the bare answer.
        simplified: the answer with its reason in a few words.
        detailed: the answer after the reasoning, step by step.
    """

    ask: str
    none: str
    simplified: str
    detailed: str


_ARITHMETIC = (
    (
        "What is 47 plus 38?",
        "85",
        "40 + 30 = 70 and 7 + 8 = 15, so 85.",
        "First add the tens: 40 plus 30 is 70. Then add the ones: 7 plus 8 is 15. Now put both parts "
        "together: 70 plus 15 is 85. So the answer is 85.",
    ),
    (
        "What is 92 minus 35?",
        "57",
        "92 - 30 = 62 and 62 - 5 = 57, so 57.",
        "First take away the tens: 92 minus 30 is 62. Then take away the ones: 62 minus 5 is 57. To "
        "check, 57 plus 35 is 92, which is right. So the answer is 57.",
    ),
    (
        "What is 14 times 6?",
        "84",
        "10 * 6 = 60 and 4 * 6 = 24, so 84.",
        "Split 14 into 10 and 4. First, 10 times 6 is 60. Next, 4 times 6 is 24. Adding the two products,"
        " 60 plus 24 is 84. So the answer is 84.",
    ),
    (
        "What is 96 divided by 8?",
        "12",
        "80 / 8 = 10 and 16 / 8 = 2, so 12.",
        "Split 96 into 80 and 16. First, 80 divided by 8 is 10. Next, 16 divided by 8 is 2. Adding the "
        "two parts, 10 plus 2 is 12. So the answer is 12.",
    ),
    (
        "Tom has 5 boxes with 9 pencils each. He gives away 7 pencils. How many pencils does he have left?",
        "38",
        "5 * 9 = 45 and 45 - 7 = 38, so 38.",
        "First find how many pencils Tom has: 5 boxes with 9 pencils each are 5 times 9, which is 45 "
        "pencils. He gives away 7, and 45 minus 7 is 38. So he has 38 pencils left.",
    ),
    (
        "A book costs 12 dollars and a pen costs 3 dollars. How much do 2 books and 4 pens cost?",
        "36 dollars",
        "2 * 12 = 24 and 4 * 3 = 12, so 24 + 12 = 36 dollars.",
        "First the books: 2 books at 12 dollars each cost 24 dollars. Then the pens: 4 pens at 3 dollars "
        "each cost 12 dollars. Together that is 24 plus 12, which is 36. So they cost 36 dollars.",
    ),
    (
        "A train leaves at 9:20 and arrives at 11:05. How many minutes does the trip take?",
        "105 minutes",
        "9:20 to 11:20 is 120 minutes, 15 less is 105 minutes.",
        "From 9:20 to 10:20 is one hour, or 60 minutes. From 10:20 to 11:05 is another 45 minutes. Adding"
        " the two, 60 plus 45 is 105. So the trip takes 105 minutes.",
    ),
    (
        "What is half of 58?",
        "29",
        "50 / 2 = 25 and 8 / 2 = 4, so 29.",
        "Split 58 into 50 and 8. Half of 50 is 25, and half of 8 is 4. Adding the two halves, 25 plus 4 "
        "is 29. So the answer is 29.",
    ),
    (
        "A rectangle is 7 meters long and 4 meters wide. What is its perimeter?",
        "22 meters",
        "7 + 4 = 11 and 2 * 11 = 22 meters.",
        "The perimeter is the length of all four sides. Two sides are 7 meters long, which makes 14 "
        "meters. The other two are 4 meters long, which makes 8 meters. Together that is 14 plus 8, so "
        "the perimeter is 22 meters.",
    ),
    (
        "What is 25 percent of 80?",
        "20",
        "25 percent is a quarter, and 80 / 4 = 20.",
        "Percent means out of a hundred, so 25 percent is 25 out of 100, which is one quarter. To find a "
        "quarter of 80, divide 80 by 4, and that gives 20. So the answer is 20.",
    ),
    (
        "Anna is 11 years old. Her brother is 3 years younger. How old are they together?",
        "19",
        "11 - 3 = 8 and 11 + 8 = 19.",
        "Her brother is 3 years younger than Anna, so his age is 11 minus 3, which is 8. To get the sum "
        "of their ages, add 11 and 8, which is 19. So together they are 19 years old.",
    ),
    (
        "A shop sells 18 apples in the morning and 26 in the afternoon. It had 60. How many are left?",
        "16",
        "18 + 26 = 44 and 60 - 44 = 16.",
        "First find how many apples were sold: 18 in the morning and 26 in the afternoon are 18 plus 26, "
        "which is 44. The shop had 60 apples, and 60 minus 44 is 16. So 16 apples are left.",
    ),
    (
        "What is 7 squared?",
        "49",
        "7 * 7 = 49.",
        "Squaring a number means to multiply it by itself. So 7 squared is 7 times 7. Since 7 times 5 is "
        "35 and 7 times 2 is 14, 7 times 7 is 35 plus 14, which is 49. So the answer is 49.",
    ),
    (
        "Three friends share 51 marbles equally. How many does each of them get?",
        "17",
        "30 / 3 = 10 and 21 / 3 = 7, so 17.",
        "To share equally, divide 51 by 3. Split 51 into 30 and 21. First, 30 divided by 3 is 10. Next, "
        "21 divided by 3 is 7. Together that is 10 plus 7, which is 17. So each friend gets 17 marbles.",
    ),
    (
        "A car drives 60 miles in one hour. How far does it drive in two and a half hours?",
        "150 miles",
        "2 * 60 = 120 and half of 60 is 30, so 150 miles.",
        "In each hour the car drives 60 miles, so in two hours it drives 120 miles. In the remaining half"
        " hour it drives half of 60, which is 30 miles. Together that is 120 plus 30. So it drives 150 "
        "miles.",
    ),
    (
        "How many days are there in 6 weeks?",
        "42 days",
        "A week has 7 days, and 6 * 7 = 42 days.",
        "One week has 7 days. To find the days in 6 weeks, multiply 6 by 7. Since 5 times 7 is 35, and "
        "one more week has 7 days, that makes 35 plus 7, which is 42. So there are 42 days.",
    ),
)
_SENSE = (
    (
        "Can you see the stars better in a big city or in a desert?",
        "In a desert",
        "In a desert, because there is little light at night.",
        "Stars are faint, so we see them best when the sky is dark. A big city has many lamps, and their "
        "light makes the sky bright. A desert has almost no lamps, and the air is clear. So you can see "
        "the stars better in a desert.",
    ),
    (
        "What melts faster in the sun, an ice cube or a candle?",
        "An ice cube",
        "An ice cube, because ice melts at a lower temperature.",
        "Ice melts when it is warmer than the freezing point of water, and a sunny place is warmer than "
        "that. Wax melts only when it gets quite hot, hotter than most days in the sun. So an ice cube "
        "melts faster than a candle.",
    ),
    (
        "Why do people carry an umbrella?",
        "To stay dry",
        "To stay dry when it rains.",
        "Rain makes clothes and hair wet, which is cold and not pleasant. An umbrella is a roof that you "
        "hold over your head, so the water falls to the sides. So people carry an umbrella to stay dry.",
    ),
    (
        "Which animal is larger, a mouse or an elephant?",
        "An elephant",
        "An elephant, because it weighs several tons.",
        "A mouse is so small that it fits in a hand and weighs less than an apple. An elephant is taller "
        "than a person and weighs several tons. Comparing the two sizes, an elephant is much larger than "
        "a mouse.",
    ),
    (
        "Where do you keep milk so that it stays fresh?",
        "In a fridge",
        "In a fridge, because cold slows down bacteria.",
        "Milk turns sour when bacteria grow in it. Bacteria grow quickly when it is warm and slowly when "
        "it is cold. The coldest place in a kitchen for drinks is the fridge. So you keep milk in a "
        "fridge.",
    ),
    (
        "What do you need to cut paper?",
        "Scissors",
        "Scissors, because they have two sharp blades.",
        "To cut paper you need something sharp that can be moved along a line. Scissors have two sharp "
        "blades that close on the paper from both sides, so the cut is straight. So you need scissors to "
        "cut paper.",
    ),
    (
        "In which season do leaves fall from the trees?",
        "In autumn",
        "In autumn, when days become short and cold.",
        "In spring trees grow new leaves, and in summer the leaves are green. When the days become "
        "shorter and colder, trees stop feeding their leaves, which turn yellow and drop. That season is "
        "autumn. So leaves fall in autumn.",
    ),
    (
        "Can a fish live on land?",
        "No, it cannot",
        "No, because a fish breathes with gills in water.",
        "To live, an animal must breathe. A fish breathes with gills, which take oxygen from water. On "
        "land the gills dry out and stick together, and the fish gets no oxygen. So a fish cannot live on"
        " land.",
    ),
    (
        "What should you do before you cross a street?",
        "Look both ways",
        "Look both ways, because cars may come.",
        "Cars can come from the left and from the right, and they need some time to stop. If you step on "
        "the street without looking, a car may hit you. So before you cross a street you should look both"
        " ways.",
    ),
    (
        "What sinks in water, a stone or a cork?",
        "A stone",
        "A stone, because it is denser than water.",
        "A thing sinks when it is heavier than the same amount of water. A cork is full of air and is "
        "much lighter than water, so it floats. A stone is heavier than water. So a stone sinks.",
    ),
    (
        "What do bees make?",
        "Honey",
        "Honey, which they make from nectar.",
        "Bees fly from flower to flower and collect a sweet juice, the nectar. They carry it to their "
        "hive and let the water in it dry up, until it is thick and sweet. That is honey. So bees make "
        "honey.",
    ),
    (
        "Which is hotter, the sun or the moon?",
        "The sun",
        "The sun, because it is a burning star.",
        "The sun is a star that makes its own light and heat, and its surface has thousands of degrees. "
        "The moon is made of rock, makes no light, and only reflects the light that it gets. So the sun "
        "is hotter than the moon.",
    ),
    (
        "What do you wear on your hands when it is cold?",
        "Gloves",
        "Gloves, because they keep fingers warm.",
        "When it is cold, fingers lose their heat quickly because they are thin. Something soft and thick"
        " around each finger holds the warm air. Clothes that are made for hands in that way are gloves. "
        "So you wear gloves.",
    ),
    (
        "Where would you borrow a book without paying for it?",
        "At a library",
        "At a library, which lends books for free.",
        "A shop sells books, so there you would have to pay. A library has many books that belong to "
        "everybody, and it lends them for some weeks to people who bring them back. So you would borrow a"
        " book at a library.",
    ),
    (
        "Is it possible to drive a car from Japan to Hawaii?",
        "It is not possible",
        "It is not possible, because an ocean lies between them.",
        "A car needs a road or at least firm ground. Japan and Hawaii are islands, and between them lies "
        "the Pacific Ocean, without any bridge or tunnel. A car cannot drive on water. So it is not "
        "possible.",
    ),
    (
        "What do plants need to grow besides water and soil?",
        "Light",
        "Light, because it gives them energy.",
        "Plants drink water and take minerals from the soil, but these give them no energy. Their leaves "
        "catch the light of the sun and use it to make sugar, from which the plant grows. So besides "
        "water and soil plants need light.",
    ),
)


def questions() -> tuple[Question, ...]:
    """32 questions, of arithmetic and of common sense in turn."""
    return tuple(Question(*row) for pair in zip(_ARITHMETIC, _SENSE, strict=True) for row in pair)
