"""The words of the simulated ad world: its category tree, products, brands and phrases.

Every brand is invented. Ads and content of one leaf share its words, so that a text encoder can
tell what belongs together. Knows nothing of users, events or how words are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

PRODUCTS, BRANDS, QUALITIES, SUBJECTS = 6, 5, 5, 4


@dataclass(frozen=True)
class Leaf:
    """The words of one leaf category, and whom it draws: mean age, and women's lean (-1 to 1)."""

    path: str
    age: float
    lean: float
    brands: tuple[str, ...]
    products: tuple[str, ...]
    qualities: tuple[str, ...]
    subjects: tuple[str, ...]


# top category: (mean age, lean, {leaf: (brands, products, qualities, content subjects)})
_TREE: dict[str, tuple[float, float, dict[str, tuple[str, str, str, str]]]] = {
    "sports": (
        30.0,
        -0.2,
        {
            "running": (
                "Stridewell Paceline Fleetora Kilomar Tempoa",
                "trail running shoes, road running shoes, hydration vest, running watch, "
                "compression socks, running jacket",
                "cushioned, lightweight, waterproof, breathable, race-day",
                "marathon training, interval sessions, running form, trail races",
            ),
            "cycling": (
                "Velomond Spokefield Crankwise Pedalux Gravelo",
                "road bike helmet, gravel tyres, cycling jersey, bike lights, indoor trainer, "
                "cycling computer",
                "aerodynamic, puncture-proof, reflective, carbon, all-weather",
                "hill climbs, bike maintenance, commuting by bike, gravel tours",
            ),
            "fitness": (
                "Ironpeak Corewell Flexmora Liftano Repforge",
                "adjustable dumbbells, kettlebell set, resistance bands, yoga mat, rowing machine, "
                "protein powder",
                "foldable, non-slip, heavy-duty, compact, beginner",
                "home workouts, strength training, core exercises, mobility routines",
            ),
            "camping": (
                "Pinetrek Campora Ridgewild Fernhaven Outback",
                "two-person tent, sleeping bag, camping stove, hiking backpack, trekking poles, "
                "camping lantern",
                "ultralight, four-season, insulated, windproof, quick-pitch",
                "wild camping, hut hikes, campfire cooking, packing lists",
            ),
            "football": (
                "Goalmark Pitchside Strikero Netburst Tackler",
                "football boots, goalkeeper gloves, match football, shin guards, training goal, "
                "team shirt",
                "firm-ground, studded, professional, junior, limited",
                "penalty saves, league matches, dribbling drills, transfer news",
            ),
        },
    ),
    "fashion": (
        29.0,
        0.4,
        {
            "shoes": (
                "Solenne Cobbleton Heelora Walkmere Lacefield",
                "leather ankle boots, canvas sneakers, summer sandals, suede loafers, "
                "platform heels, winter boots",
                "handmade, vegan, vintage, comfortable, two-tone",
                "sneaker culture, capsule wardrobes, shoe care, street style",
            ),
            "dresses": (
                "Florabelle Linnea Velveta Maisonne Petalia",
                "linen summer dress, evening gown, wrap dress, knitted dress, shirt dress, "
                "pleated skirt",
                "floral, flowing, organic, elegant, plus-size",
                "wedding guest looks, spring colours, dressing for work, runway shows",
            ),
            "watches": (
                "Chronelle Tidemark Horolux Dialstone Secondo",
                "automatic wristwatch, diver watch, leather watch strap, chronograph, "
                "minimalist watch, pocket watch",
                "sapphire, stainless, limited-edition, slim, luminous",
                "watch collecting, mechanical movements, dress codes, vintage finds",
            ),
            "bags": (
                "Totemoor Satchelo Handloom Clutchwell Duffino",
                "leather tote bag, canvas backpack, crossbody bag, weekender bag, laptop sleeve, "
                "card wallet",
                "full-grain, waxed, recycled, spacious, quilted",
                "travel light, bag organisers, leather craft, designer outlets",
            ),
        },
    ),
    "beauty": (
        31.0,
        0.7,
        {
            "skincare": (
                "Dewlina Purella Glowmist Serenova Botanica",
                "vitamin serum, night cream, cleansing foam, sunscreen lotion, clay mask, "
                "eye cream",
                "hydrating, fragrance-free, brightening, gentle, anti-ageing",
                "morning routines, sensitive skin, ingredient lists, winter skin",
            ),
            "makeup": (
                "Rougette Blushine Velourie Lipora Palettine",
                "matte lipstick, eyeshadow palette, liquid foundation, volume mascara, "
                "brow pencil, setting spray",
                "long-lasting, shimmering, smudge-proof, nude, buildable",
                "smoky eyes, five-minute faces, contouring, bridal looks",
            ),
            "haircare": (
                "Tressel Silkroot Curlique Manewell Strandia",
                "repair shampoo, hair oil, ionic hairdryer, curling wand, scalp tonic, "
                "colour conditioner",
                "nourishing, sulphate-free, volumising, ceramic, keratin",
                "curly methods, hair growth, home colouring, heatless styles",
            ),
            "perfume": (
                "Essentia Ambrelle Citrona Noirmont Vetivere",
                "eau de parfum, citrus cologne, scented candle, travel atomiser, body mist, "
                "perfume sampler",
                "woody, floral-musk, unisex, niche, long-wearing",
                "layering scents, fragrance notes, gift ideas, summer scents",
            ),
        },
    ),
    "food": (
        36.0,
        0.1,
        {
            "coffee": (
                "Roastery Cremona Beanfold Arabella Mokaro",
                "espresso machine, whole coffee beans, burr grinder, milk frother, pour-over set, "
                "cold brew jug",
                "single-origin, dark-roast, stainless, barista, fair-trade",
                "latte art, home espresso, roasting, brewing methods",
            ),
            "snacks": (
                "Crunchera Nutfield Sweetlane Salteo Munchwell",
                "roasted nut mix, dark chocolate bar, fruit crisps, rice crackers, granola bites, "
                "sour gummies",
                "sugar-free, organic, spicy, sharing-size, gluten-free",
                "taste tests, movie snacks, lunch boxes, world sweets",
            ),
            "meal kits": (
                "Pantrio Freshcrate Cookwell Dinnera Forkful",
                "weekly meal kit, vegetarian box, family dinner box, ramen kit, breakfast bundle, "
                "sauce collection",
                "seasonal, high-protein, ready-made, low-carb, chef-designed",
                "weeknight dinners, one-pot recipes, meal planning, knife skills",
            ),
            "wine": (
                "Vinolane Cellarmont Graperidge Barrique Uvalta",
                "red wine case, sparkling wine, natural wine box, wine cooler, decanter set, "
                "alcohol-free wine",
                "award-winning, dry, organic, vintage, small-batch",
                "wine tasting, vineyard tours, food pairings, cellar tips",
            ),
            "tea": (
                "Leafmont Steepwell Chamora Teahaven Oolara",
                "green tea, herbal infusion, matcha set, cast-iron teapot, chai blend, "
                "tea advent box",
                "loose-leaf, ceremonial, caffeine-free, smoked, calming",
                "tea ceremonies, afternoon tea, iced tea recipes, tea gardens",
            ),
        },
    ),
    "home": (
        42.0,
        0.2,
        {
            "furniture": (
                "Oakline Nordhus Sofarelle Cabinetto Timberly",
                "corner sofa, standing desk, dining table, bookshelf, bed frame, lounge chair",
                "solid-oak, modular, upholstered, space-saving, mid-century",
                "small flats, room makeovers, wood finishes, interior trends",
            ),
            "kitchen": (
                "Panmaster Cookhaus Bladewell Simmera Ovenda",
                "cast-iron skillet, air fryer, chef knife, stand mixer, food containers, "
                "pressure cooker",
                "non-stick, cordless, dishwasher-safe, professional, ceramic",
                "bread baking, batch cooking, kitchen hacks, sharpening knives",
            ),
            "garden": (
                "Greenspade Florifield Mowell Rootsy Hedgeway",
                "robot mower, raised bed, garden hose, pruning shears, greenhouse kit, "
                "patio heater",
                "self-watering, rust-free, cordless, cedar, weatherproof",
                "growing tomatoes, lawn care, pruning roses, balcony gardens",
            ),
            "bedding": (
                "Slumberly Cottonera Dozewell Featherby Nightnest",
                "memory foam mattress, linen bedding, down duvet, cooling pillow, "
                "weighted blanket, mattress topper",
                "hypoallergenic, orthopaedic, breathable, washable, king-size",
                "sleep hygiene, bedroom colours, making beds, back pain",
            ),
            "tools": (
                "Hammerfast Drillmont Boltwise Torquell Sawyer",
                "cordless drill, tool box, circular saw, laser level, paint sprayer, "
                "socket wrench set",
                "brushless, 18-volt, heavy-duty, precision, portable",
                "shelf building, tiling, home repairs, workshop tours",
            ),
        },
    ),
    "electronics": (
        30.0,
        -0.4,
        {
            "phones": (
                "Novacell Zentro Pixelane Orbitel Halomo",
                "foldable phone, phone case, wireless charger, power bank, screen protector, "
                "camera phone",
                "5G, rugged, magnetic, fast-charging, refurbished",
                "phone photography, battery life, unboxings, hidden settings",
            ),
            "audio": (
                "Sonarelle Bassfield Echowave Tonality Audimax",
                "noise-cancelling headphones, bluetooth speaker, soundbar, turntable, "
                "wireless earbuds, studio microphone",
                "hi-fi, waterproof, spatial, portable, low-latency",
                "vinyl records, podcast recording, sound tests, home cinema",
            ),
            "computers": (
                "Compura Bytefield Quantix Keystrom Circuiton",
                "gaming laptop, mechanical keyboard, curved monitor, ergonomic mouse, "
                "solid-state drive, mini desktop",
                "ultra-thin, silent, backlit, high-refresh, wireless",
                "desk setups, building computers, coding tips, benchmark tests",
            ),
            "cameras": (
                "Lensora Shuttermill Apertino Framelight Optivue",
                "mirrorless camera, action camera, drone, prime lens, camera tripod, "
                "instant camera",
                "stabilised, full-frame, foldable, weather-sealed, 4K",
                "landscape photography, video editing, portrait light, drone footage",
            ),
            "smart home": (
                "Homelink Lumora Sensify Autohaus Nestral",
                "smart thermostat, robot vacuum, video doorbell, smart bulbs, security camera, "
                "smart lock",
                "voice-controlled, energy-saving, app-enabled, self-emptying, wireless",
                "home automation, saving energy, privacy at home, gadget tests",
            ),
        },
    ),
    "games": (
        23.0,
        -0.5,
        {
            "mobile games": (
                "Puzzlore Tapquest Dragonry Kingsfall Merjo",
                "puzzle adventure game, city builder game, card battle game, racing game, "
                "farming game, idle hero game",
                "free-to-play, offline, multiplayer, story-rich, casual",
                "game walkthroughs, new releases, high scores, guild wars",
            ),
            "consoles": (
                "Playdeck Joystra Consola Pixelforge Arcadian",
                "handheld console, wireless controller, racing wheel, gaming headset, "
                "charging dock, retro console",
                "portable, haptic, next-gen, limited, ergonomic",
                "speedruns, couch co-op, console reviews, retro gaming",
            ),
            "board games": (
                "Meepleton Dicehall Tabletopia Cardigan Hexfield",
                "strategy board game, party game, cooperative game, chess set, "
                "jigsaw puzzle, card sleeves",
                "award-winning, family, two-player, wooden, legacy",
                "game nights, rules explained, painting miniatures, chess openings",
            ),
            "esports": (
                "Headshotz Clutchmode Fragline Rankup Arenix",
                "gaming chair, gaming mouse, streaming camera, capture card, battle pass, "
                "gaming glasses",
                "adjustable, RGB, tournament, ultra-fast, lightweight",
                "tournament finals, aim training, team strategies, streaming tips",
            ),
        },
    ),
    "travel": (
        39.0,
        0.1,
        {
            "city trips": (
                "Urbanaut Citywise Strollo Weekendly Metropass",
                "city break package, museum pass, boutique hotel, food tour, river cruise, "
                "hop-on bus ticket",
                "three-night, central, guided, last-minute, romantic",
                "hidden cafes, night trains, old towns, weekend itineraries",
            ),
            "beach": (
                "Palmara Sunterra Lagunio Wavecrest Corallo",
                "beach resort stay, snorkelling tour, island hopping, surf camp, villa rental, "
                "sailing trip",
                "all-inclusive, beachfront, family-friendly, secluded, adults-only",
                "quiet islands, surf spots, packing for summer, coral reefs",
            ),
            "luggage": (
                "Trolleyon Cabinaire Packwell Voyagio Rollmaster",
                "cabin suitcase, packing cubes, travel pillow, luggage tracker, garment bag, "
                "travel adapter",
                "hard-shell, lightweight, expandable, lockable, four-wheel",
                "airport tips, one-bag travel, long flights, packing hacks",
            ),
            "mountains": (
                "Alpinora Summitel Chaletta Glacion Edelweg",
                "ski pass, mountain chalet, guided hike, ski rental, spa hotel, "
                "panorama train ticket",
                "snow-sure, ski-in, alpine, early-bird, off-season",
                "powder days, via ferrata, alpine huts, mountain villages",
            ),
        },
    ),
    "finance": (
        43.0,
        -0.1,
        {
            "banking": (
                "Fidelane Coinstead Vaultery Banqo Penniwise",
                "current account, savings account, cashback card, student account, joint account, "
                "travel card",
                "no-fee, high-interest, mobile, instant, metal",
                "saving money, budgeting apps, inflation, bank comparisons",
            ),
            "investing": (
                "Tradewell Bullmark Indexa Capitolo Dividenda",
                "index fund plan, trading app, robo adviser, pension plan, gold savings, "
                "bond portfolio",
                "commission-free, sustainable, automated, flexible, tax-efficient",
                "stock markets, compound interest, early retirement, portfolio ideas",
            ),
            "insurance": (
                "Shieldon Safeharbor Covera Guardwell Assurio",
                "car insurance, travel insurance, pet insurance, life insurance, "
                "home insurance, dental plan",
                "comprehensive, cancel-anytime, family, online, no-claims",
                "claim stories, reading policies, storm damage, insurance myths",
            ),
            "loans": (
                "Lendora Mortgro Creditwise Borrowell Housefund",
                "home mortgage, car loan, personal loan, business loan, student loan, "
                "bridge financing",
                "fixed-rate, low-interest, fast-approval, flexible, transparent",
                "buying a house, credit scores, interest rates, paying off debt",
            ),
        },
    ),
    "education": (
        27.0,
        0.1,
        {
            "languages": (
                "Linguara Wordbridge Parlano Fluentia Verbosa",
                "Spanish course, English tutor, Japanese app, French lessons, vocabulary cards, "
                "grammar workbook",
                "conversational, self-paced, one-to-one, intensive, gamified",
                "pronunciation drills, language exchange, learning vocabulary, polyglot stories",
            ),
            "coding": (
                "Codewright Loopacademy Syntaxia Devpath Bitschool",
                "Python course, web bootcamp, data science degree, cloud certificate, "
                "robotics kit, algorithm book",
                "project-based, online, mentored, job-ready, beginner",
                "first programs, interview questions, machine learning, open source",
            ),
            "music lessons": (
                "Chordwell Melodia Strumline Keyara Tempello",
                "digital piano, acoustic guitar, singing lessons, drum kit, ukulele set, "
                "music theory course",
                "weighted-key, beginner, left-handed, online, compact",
                "easy songs, practice routines, reading notes, guitar riffs",
            ),
            "books": (
                "Pageturn Inkhaven Storywell Chapterly Libretto",
                "crime novel, audiobook subscription, e-reader, cookbook, fantasy saga, "
                "reading lamp",
                "bestselling, illustrated, signed, bite-size, waterproof",
                "book clubs, author interviews, reading lists, library tours",
            ),
        },
    ),
    "family": (
        34.0,
        0.5,
        {
            "baby": (
                "Cuddlane Babora Tinytoes Lullabelle Nestling",
                "baby stroller, car seat, baby monitor, diaper bag, baby carrier, bottle warmer",
                "lightweight, convertible, organic, foldable, certified",
                "newborn sleep, first foods, birth stories, baby milestones",
            ),
            "toys": (
                "Brickaboo Woodlings Playnest Toyella Funfair",
                "building blocks, wooden train set, doll house, science kit, plush toy, "
                "balance bike",
                "educational, eco-friendly, magnetic, giant, glow-in-the-dark",
                "rainy days, craft ideas, birthday parties, learning by play",
            ),
            "pets": (
                "Pawmore Whiskero Barkwell Furrytail Petandra",
                "dry dog food, cat tree, dog harness, automatic feeder, aquarium set, cat litter",
                "grain-free, scratch-proof, no-pull, natural, odour-free",
                "puppy training, cat behaviour, fish tanks, vet advice",
            ),
            "party": (
                "Confetto Balloonia Fetely Celebria Cakemoor",
                "balloon garland, birthday cake kit, costume set, party tableware, photo booth, "
                "gift hamper",
                "biodegradable, personalised, glittering, themed, reusable",
                "children's birthdays, costume ideas, cake decorating, garden parties",
            ),
        },
    ),
    "autos": (
        44.0,
        -0.5,
        {
            "cars": (
                "Autorion Drivemont Velocara Motoria Wheelhaus",
                "electric hatchback, family van, hybrid estate, compact city car, sports coupe, "
                "car subscription",
                "long-range, all-wheel, seven-seat, certified, fuel-efficient",
                "test drives, charging trips, car comparisons, driving abroad",
            ),
            "car parts": (
                "Gripstone Axlewise Filtron Sparkwell Brakely",
                "winter tyres, dash camera, roof box, floor mats, wall charger, brake pads",
                "all-season, universal, aerodynamic, custom-fit, premium",
                "oil changes, tyre tests, car detailing, saving fuel",
            ),
            "motorbikes": (
                "Ridgeback Throttleo Twistgrip Leanway Torqueson",
                "motorbike helmet, leather jacket, electric scooter, touring motorbike, "
                "saddle bags, riding gloves",
                "full-face, armoured, vintage, street-legal, thermal",
                "mountain passes, riding safety, custom builds, touring diaries",
            ),
            "boats": (
                "Marinelle Keelhaven Paddlora Anchorby Driftwell",
                "inflatable kayak, paddle board, life jacket, fishing boat, sailing course, "
                "outboard motor",
                "inflatable, two-seat, lightweight, coastal, electric",
                "kayak tours, knots, fishing spots, harbour towns",
            ),
        },
    ),
}


def _words(text: str, count: int) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if len(parts) != count:
        raise ValueError(f"expected {count} phrases: {text!r}")
    return parts


LEAVES: tuple[Leaf, ...] = tuple(
    Leaf(
        path=f"{top}/{name}",
        age=age,
        lean=lean,
        brands=_words(brands.replace(" ", ","), BRANDS),
        products=_words(products, PRODUCTS),
        qualities=_words(qualities, QUALITIES),
        subjects=_words(subjects, SUBJECTS),
    )
    for top, (age, lean, leaves) in _TREE.items()
    for name, (brands, products, qualities, subjects) in leaves.items()
)

# what a creative says about its marketing object
WORDINGS = (
    "for less",
    "now 20% off",
    "free delivery",
    "new this week",
    "only today",
    "try it free",
    "loved by thousands",
    "last pieces left",
    "our bestseller",
    "made to last",
    "back in stock",
    "join the club",
)

PITCHES = (
    "Order today and send it back within thirty days.",
    "Rated 4.8 out of 5 by our customers.",
    "Made for people who look closely.",
    "Small price, no compromises.",
    "See it, try it, keep it.",
    "Designed with experts and tested every day.",
)

# (how it is consumed, title); `{product}` and `{subject}` come from one leaf
TITLES = (
    ("play", "{subject} with the right {product}"),
    ("play", "we tested every {product}"),
    ("play", "{subject}: my {product} story"),
    ("play", "{subject} in ten minutes: {product}"),
    ("read", "how to choose a good {product}"),
    ("read", "{subject}: is a {product} worth it"),
    ("read", "a beginner's guide: {subject} and {product}"),
    ("search", "best {product} for {subject}"),
)

GENDERS = ("female", "male")
CITIES = (
    *("Shenzhen", "Lisbon", "Osaka", "Toronto", "Nairobi", "Lyon", "Austin", "Krakow", "Seoul"),
    *("Valencia", "Porto", "Leeds", "Hamburg", "Denver", "Cordoba", "Tallinn", "Adelaide"),
    *("Bergen", "Cape Town", "Hanoi"),
)
EDUCATIONS = ("secondary school", "vocational training", "bachelor", "master", "doctorate")
# (occupation, youngest age, oldest age)
OCCUPATIONS = (
    ("student", 14, 27),
    ("nurse", 20, 66),
    ("teacher", 23, 66),
    ("engineer", 22, 66),
    ("sales assistant", 17, 66),
    ("office clerk", 19, 66),
    ("driver", 20, 66),
    ("designer", 20, 60),
    ("cook", 17, 64),
    ("accountant", 22, 66),
    ("manager", 28, 67),
    ("electrician", 18, 65),
    ("retired", 60, 99),
)
