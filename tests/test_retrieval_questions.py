"""Fifty questions about the texts of a made-up shop for electronics: how often the passage that answers is found."""

from __future__ import annotations

from shoplm.retrieval import Knowledge, Passage

# By a passage's title: what it says, and questions that it answers.
TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Repairs": (
        "We repair phones and laptops in 5 working days. An estimate costs 15 euros, which is taken off the bill.",
        (
            "How long does it take to fix my phone?",
            "What is the charge for an estimate?",
            "Can you mend a broken laptop?",
        ),
    ),
    "Warranty": (
        "Every product has a warranty of 2 years; batteries have 6 months. Bring the invoice.",
        (
            "How many years of warranty do I get?",
            "Is the battery covered as well?",
            "Do I need the invoice for a warranty claim?",
        ),
    ),
    "Shipping abroad": (
        "Parcels to Switzerland and Norway cost 12 euros. Customs duties are paid by the buyer.",
        (
            "Do you ship to Norway?",
            "Who pays customs?",
            "How much is a parcel to Switzerland?",
        ),
    ),
    "Shipping at home": (
        "Shipping costs 3.90 euros and nothing from 50 euros on. Parcels arrive in 2 to 3 days.",
        (
            "What does shipping cost?",
            "When will my parcel arrive?",
            "From what amount is shipping free?",
        ),
    ),
    "Old devices": (
        "We take back old devices for recycling, free of charge, also large ones when we deliver a new one.",
        (
            "Can I leave my old television with you?",
            "Do you recycle devices?",
            "Is recycling of an old fridge free?",
        ),
    ),
    "Installation": (
        "Our technicians connect washing machines and hang televisions on the wall for 39 euros.",
        (
            "Can somebody install my washing machine?",
            "What do technicians charge for connecting a machine?",
            "Do you mount televisions on walls?",
        ),
    ),
    "Paying by instalments": (
        "From 200 euros on you can pay in 12 monthly instalments without interest.",
        (
            "Can I pay monthly?",
            "Is there interest on instalments?",
            "From how many euros can I pay in instalments?",
        ),
    ),
    "Gift vouchers": (
        "Vouchers are valid for 3 years and cannot be exchanged for cash.",
        (
            "How long is a voucher valid?",
            "Can I get cash for my voucher?",
            "Do gift cards expire?",
        ),
    ),
    "Student discount": (
        "Students get 8 percent off laptops and tablets with a valid student card.",
        (
            "Is there a discount for students?",
            "How much do students save on a tablet?",
            "I am a student, what do I have to show?",
        ),
    ),
    "Price promise": (
        "If you find it cheaper elsewhere within 14 days, we refund the difference.",
        (
            "I saw it cheaper elsewhere, what now?",
            "Do you match prices of others?",
            "Will you refund a price difference?",
        ),
    ),
    "When we are open": (
        "Tuesday to Saturday from 10 a.m. to 6.30 p.m. We are closed on Sundays, Mondays and public holidays.",
        (
            "Are you open on Mondays?",
            "When do you close on Saturday?",
            "What are the opening hours?",
        ),
    ),
    "Parking": (
        "There are 40 parking spaces behind the shop, free for two hours.",
        (
            "Where can I park?",
            "Is parking free?",
            "How many spaces does the car park have?",
        ),
    ),
    "Tool rental": (
        "Drills and sanders are rented by the day from 9 euros, with a deposit of 50 euros.",
        (
            "Can I rent a drill?",
            "How high is the deposit for a rented sander?",
            "What does renting tools cost a day?",
        ),
    ),
    "Key cutting": (
        "Keys are cut while you wait, from 6 euros. Security keys take a week.",
        (
            "Can you cut a key?",
            "How long does a security key take?",
            "Do I have to wait for a new key?",
        ),
    ),
    "Cancelling an order": (
        "An order can be cancelled until it is shipped, in your account or by phone.",
        (
            "Can I cancel my order?",
            "How do I cancel something I ordered?",
            "Until when is cancellation possible?",
        ),
    ),
    "Sending things back": (
        "Unused goods can be sent back within 30 days; we pay for the label. Opened software or earphones are not.",
        (
            "Can I send something back?",
            "Are opened earphones returnable?",
            "Who pays for the return label?",
            "How many days do I have for returning goods?",
            "Can I return software?",
        ),
    ),
}


def test_the_passage_that_answers_is_found_among_few() -> None:
    knowledge = Knowledge([Passage("shop.md", title, text) for title, (text, _) in TEXTS.items()])
    asked = [(title, question) for title, (_, questions) in TEXTS.items() for question in questions]
    found = [[passage.title for passage in knowledge.search(question, 3)] for _, question in asked]
    assert [question for (title, question), titles in zip(asked, found, strict=True) if title not in titles] == []
    assert sum(title == titles[0] for (title, _), titles in zip(asked, found, strict=True)) >= 45
    assert sum(map(len, found)) <= 65  # what does not answer distracts
