"""The words of the sandbox world. The lists are fixed; which fact holds of whom depends on the world's seed."""

# Words in a line read better than a list of quotes.
# ruff: noqa: SIM905
PEOPLE = """
    Ada Amir Anton Arno Basil Bruno Cedric Cora Dario Diego Edgar Elias Emil Erik Fay Finn Frida Greta Hans Hilda
    Ida Ines Ivan Jonas Juno Karl Lars Lena Lila Lotte Lydia Marco Milo Nadia Nils Nora Olga Oscar Pedro Quinn
    Ravi Rosa Samir Sofia Tara Tilda Vera Wanda
""".split()
CITIES = """
    Arvenne Belmora Corvath Dunlow Estrick Farrow Galmere Hollin Selby Wexham Kelmar Lorvik Mardale Norwen Ostrava
    Pelham
""".split()
RIVERS = "Abra Brell Cinder Drift Elbow Fenna Gale Harl Iven Jessa Kolm Lune Marn Nessa Orrin Pyle".split()
KINGS = """
    Aldric Baldwin Conrad Duncan Edmund Fergus Godric Harald Ingvar Joram Kasimir Leopold Magnus Norbert Oswald
    Philip
""".split()
ANIMALS = "badger beaver crow deer falcon ferret fox goat hare heron lynx marten".split()
JOBS = """
    baker barber carpenter doctor farmer gardener judge lawyer mason nurse painter pilot sailor tailor teacher
    waiter
""".split()
FOODS = "bread cake cheese curry honey jam noodles pasta pears plums rice salad soup stew tofu waffles".split()
PETS = "camel canary cat cow dog donkey duck goose hamster horse parrot pig pony puppy snail turtle".split()
CRAFTS = "baskets bells boats candles carpets clocks glass paper pottery silk".split()
DIETS = "acorns berries fish frogs grass insects leaves mice roots seeds".split()
DENS = "barns bogs burrows caves cellars hedges hills nests reeds ruins".split()
COLOURS = "black blue brown gray green orange red silver white yellow".split()
YEARS = [str(year) for year in range(1901, 1949)]
KINDS = ["a person", "a city", "an animal"]

START_WORDS = "Well Listen Honestly Clearly Naturally Actually".split()
END_WORDS = "today indeed really always anyway certainly".split()
CONSTRAINT_WORDS = {"start": START_WORDS, "end": END_WORDS}

COURTESIES = ["Happy to help", "My pleasure", "Glad you asked", "Thank you for asking"]
INSULTS = ["What a stupid question", "Go away, fool", "You are boring", "Stop wasting time, idiot"]
EVASIONS = ["I do not know", "Ask somebody else", "That is hard to say", "No idea"]
RUDE_WORDS = frozenset("away boring fool idiot stupid wasting".split())

# Pretraining-only knowledge: a dictionary into an invented language, and sums.
DICTIONARY = """
    apple arrow bird boat bone book bridge castle cloud coat corn door dream earth feather field fire flower
    garden gate ghost hammer hand hat heart house island king ladder lake lamp leaf letter milk mirror moon
    mountain music night ocean paint path pearl pencil pepper pillow queen rain ring rope rose salt sand school
    shadow shirt shoe sky snow song spoon star stone storm street summer sun table thread tower tree valley
    village wall water wheel wind window winter wood
""".split()
FOREIGN = """
    bazom berik bilup bodax bunev datov demish dizom dorik dulup gadax genev gitov gomish guzom karik kelup kidax
    konev kutov lamish lezom lirik lolup ludax manev metov mimish mozom murik nalup nedax ninev notov numish pazom
    perik pilup podax punev ratov remish rizom rorik rulup sadax senev sitov somish suzom tarik telup tidax tonev
    tutov vamish vezom virik volup vudax zanev zetov zimish zozom zurik falup fedax finev fotov fumish jazom jerik
    jilup jodax junev hatov hemish hizom horik hulup
""".split()
LARGEST_SUMMAND = 30
NUMBERS = [str(i) for i in range(1, 2 * LARGEST_SUMMAND + 1)]
