"""Plain prose that does not repeat itself: texts to look for sinks in, and the ablation's control.

Written for this report. Each is about 130 words on a matter of its own; the needle task's filler
comes from a grammar and is more alike from sentence to sentence.
"""

PASSAGES = (
    """The ferry to the island leaves at ten past seven, and in winter nobody is on it but the
    postman and two teachers. He sorts letters on a crate while they mark homework with cold
    fingers. Halfway across, where the current turns, the captain always slows down and blows the
    horn once. New passengers think there must be a rock. In truth his brother used to live in the
    white cottage above that beach and would come out and wave a towel. The cottage has been empty
    for eleven years now, and its roof has begun to sag, yet the horn is still blown every
    morning. Last spring a visitor complained about the noise. The teachers wrote back to her,
    politely, that some timetables are kept for reasons which no printed schedule could ever
    mention.""",
    """Bread goes stale faster in a refrigerator than on a shelf, which surprises people who think
    of staling as drying. Most of the water is still there. What changes is the starch: in the
    oven its granules swell and lose their order, and as the loaf cools the long molecules slowly
    line up again and push moisture out of the crumb. A few degrees above freezing this happens
    quickest. Warm the slice above sixty degrees and much of it is undone, so toast tastes fresh
    for a while. Bakers delay the process with fat, sugar, or a sour starter, each of which gets
    in the way of the crystals. Freezing works too, provided that the bread passes through the
    cool range in a hurry and is wrapped well enough to keep frost off its crust.""",
    """When the orchestra lost its hall to a flood, the youngest violinist suggested the old tram
    depot, half as a joke. The acoustics turned out to be dreadful and wonderful at once: a cymbal
    hung in the rafters for six seconds, and whispers from the back row reached the conductor word
    by word. They learned to play shorter notes. Composers began to send them pieces that used the
    echo, one of them written for twelve players who stood in the inspection pits beneath the
    rails. Audiences brought blankets and thermos flasks. By the time the marble hall had been
    dried and painted, nobody was in a rush to return, and the insurance money was spent instead
    on heaters, curtains, and a single long bench that could be moved about on wheels.""",
    """A map is a list of things that somebody decided not to draw. The surveyors who walked this
    valley in 1871 left out the goat tracks, because soldiers could not use them, and marked each
    well with care. Sixty years later a mining company printed another sheet on which the wells
    had vanished and every slope carried a number. My grandmother owned both and trusted neither.
    She kept a third in her head, in which distances were measured in songs: two to the mill, five
    to her sister, one and a chorus to the place where snow lies longest. I tried to write it down
    before she died. It cannot be folded, and north is wherever she happened to be facing, but I
    have never been lost when humming it.""",
    """Octopuses taste with their arms. Receptors in each sucker react to greasy molecules that do
    not dissolve in seawater, so a limb exploring a dark crevice can tell a crab from a stone
    without consulting the brain at all. About two thirds of the animal's neurons sit out there,
    and an arm cut off by a fisherman will go on grasping for an hour. How much the centre knows
    about what the edges are doing remains disputed. In one experiment a reward lay behind an
    opaque maze that only a single arm could enter; most subjects learned the route, though some
    seemed to succeed before they looked. Researchers now film them from four sides, and argue
    about whether the word decision should be used in the singular.""",
    """Our landlord believed that clocks ought to disagree. There were nine in the corridor, set
    anywhere from four minutes slow to a quarter of an hour fast, and he wound them on Sundays
    with great attention so that none would drift toward another. Students who stayed a term
    learned which one matched the lecture bell, and which the night bus; the cuckoo above the
    stairs was correct for Lisbon. I asked him about it while we were carrying coal. He said that
    in his first job, at a signal box, a perfect watch had once made him certain of something
    untrue. Since then he preferred to be surrounded by opinions. The rent, however, was due at
    noon exactly, by a tenth clock that hung in his kitchen and that visitors never saw.""",
    """To find a leak in a buried pipe, the older engineers used a wooden stick and their teeth.
    One end rested on the pavement above the main, the other was bitten, and the jaw did the rest:
    a hiss for a pinhole, a rumble for a broken joint, nothing at all for dry ground. It worked
    best between two and four in the morning, when the traffic had stopped and the sewers were
    low. Microphones have replaced the stick, and computers compare the arrival of a sound at both
    ends of a street to locate it within a metre. Still, the apprentices are handed a length of
    ash on their first night. A machine gives you a number, the foreman tells them, but you should
    know what it is a number of.""",
    """The committee had three weeks to name the comet's discoverer, because two amateurs on
    opposite sides of the globe had photographed it during the same hour. Neither wished to be
    second. Their cameras kept poor time, one computer having been set by hand from a radio
    announcement, and the exposure logs were contradictory. Somebody finally noticed a satellite
    crossing the corner of each picture. Its orbit was known to the metre, so its trail could
    serve as a clock, and after some arithmetic the difference shrank to eleven seconds. By then
    the pair had been writing to each other nightly. They asked for both names, in alphabetical
    order, and sent a photograph of a telescope that they intended to buy together and to put on a
    mountain between them.""",
)


def passages() -> list[str]:
    """The texts with their line breaks taken out."""
    return [" ".join(passage.split()) for passage in PASSAGES]
