"""The query bank: everyday words, most of which a collection does not hold. Their fits tell what chance gives.

They were written without a look at any data set. SIGHTS are looked for among pictures, SOUNDS among recordings.
"""

SIGHTS = """
aardvark, abacus, acorn, airport, almond, anteater, aquarium, arcade, archery, armchair, armour, asparagus, asphalt,
aspirin, aurora, axe, badger, bagel, bakery, ballet, banjo, barbecue, barn, basin, bat, battery, battleship, beetle,
bell, billboard, biscuit, bison, blackboard, blanket, blueprint, bookshelf, bottle, bracelet, bread, brick, broom,
bubble, bucket, buffalo, bullet, burger, butcher, button, cabbage, cactus, calculator, campfire, canal, candle, canoe,
canyon, cartoon, cathedral, cattle, cello, chef, cherry, chess, chimney, chimpanzee, chocolate, circus, clarinet,
classroom, cliff, cobra, cobweb, coffee, coin, comb, cow, cricket, crown, cupcake, curtain, daffodil, dancing,
dandelion, dartboard, desk, dinner, diving, doctor, dog, dolphin, donkey, door, doughnut, drum, duck, dumbbell, dune,
eagle, elevator, engine, escalator, falcon, feather, fern, fingerprint, fireplace, fish, fishing, flag, flea, flood,
flour, fossil, freeway, garage, garlic, gas station, gecko, ghost, glasses, goat, goggles, goldfish, goose, graph,
guitar, gymnastics, hammock, harbour, hawk, hay, heart, heron, hockey, honey, hospital, hummingbird, iceberg, insect,
iron, island, ivy, jacket, jar, jeans, jewellery, judge, jungle, karate, keyboard, kitchen, kite, knot, ladder,
lantern, leather, lemon, leopard, letter, library, lighthouse, lightning, lion, lizard, lorry, gun, magazine, mango,
marble, market, mask, meat, mermaid, mill, mirror, mole, monk, moon, moose, mosaic, mosque, moss, moth, mouth, mule,
mustard, necklace, needle, nest, newspaper, oar, oasis, office, onion, orange, orchestra, otter, owl, ox, oyster,
package, paint, palace, palm, pancake, parachute, parade, parking, parliament, parsley, pasta, peanut, pearl, pen,
pencil, petal, pheasant, photograph, pigeon, pilot, pine, pipe, poison, poker, police, pond, port, poster, potato,
pottery, prison, propeller, puppet, puzzle, python, quarry, rabbit, raccoon, radar, radio, railway, rainbow,
raspberry, rat, raven, receipt, restaurant, rhinoceros, rice, ring, road, rose, ruler, running, salad, salt,
satellite, sauce, saw, scarf, school, screen, seal, seaweed, sheep, shelf, shell, ship, shovel, shower, skunk, sloth,
smoke, snail, snake, sneaker, soldier, soup, spoon, spring, squirrel, staircase, steel, storm, street, submarine,
sunrise, surfing, swamp, swan, swimming, table, tennis, tent, theatre, throne, torch, towel, tractor, treasure,
triangle, truck, trumpet, tulip, uniform, vase, waffle, walnut, wedding, whale, whistle, window, wine, wolf, wool,
wrestling, yacht, yogurt, zebra, zipper
"""
SOUNDS = """
applause, bark, beep, boiling water, bagpipes, banjo, breaking dishes, breathing, bus engine, buzzing, car alarm, cash
register, cattle, cello, chainsaw, cheering, chewing, chicken, choir, church bell, clarinet, clock, cough, crackling,
creaking door, cricket, crowd, crying, cuckoo, cymbals, dial tone, dishwasher, dog, donkey, doorbell, drill, drum,
duck, electric razor, elephant, engine, explosion, fan, fire alarm, fireworks, flute, fly, foghorn, footsteps,
fountain, frog, frying, giggle, glass, goat, goose, gunshot, hail, hair dryer, hammer, harmonica, harp, heartbeat,
helicopter, horse hooves, howling wolf, humming, ice skates, jackhammer, jet, kettle, keys, kiss, lawn mower,
laughter, lion roar, machine gun, marching, meow, microwave, monkey, motorcycle, mosquito, ocean, organ, owl, paper,
parrot, phone ringing, piano, pig, pouring, printer, purring, rain, rattle, rooster, rowing, sawing, saxophone,
scissors, scratching, screech, sewing machine, sheep, ship horn, shouting, shower, silence, singing, siren,
skateboard, slap, snake hiss, sneeze, snoring, speech, splash, squeak, static, steam, stream, subway, tap, tearing,
thunder, ticking, toilet, tractor, traffic, train, trumpet, turkey, typewriter, vacuum cleaner, violin, wheels, whale
song, whispering, whistle, wind, wood chopping, yawn, zipper, accordion, ambulance, arrow, bicycle bell, billiards,
blender, bowling, bubbles, camera shutter, cannon, castanets, coffee grinder, coins, cork, cutlery, didgeridoo,
dolphin, dove, eagle, elevator, fax machine, gargling, gavel, golf swing, gong, guitar, hiccup, hyena, kazoo, lullaby,
modem, music box, oboe, peacock, ping pong, pinball, popcorn, radio, raven, rocket launch, rustling leaves, sandpaper,
seal, sitar, sleigh bells, slot machine, sonar, spray can, stapler, stomach, sword, tambourine, tennis, theremin,
trombone, tuba, tuning fork, turnstile, ukulele, velcro, waterfall, welding, whip, wind chimes, windscreen wipers,
xylophone, yodel
"""
WHO = """
a man, a woman, a boy, a girl, a child, a baby, two men, two women, three children, a group of people, a couple, a
crowd, a family, a player, a worker, an old man, a young woman, a boy and a girl, a dog, two dogs, a cat, a horse,
a bird
"""
DOING = """
standing, sitting on a bench, running, walking a dog, jumping over a fence, playing with a ball, lying on the floor,
looking at the camera, smiling, riding a bicycle, riding a horse, throwing a ball, catching a ball, kicking a football,
hitting a tennis ball, playing the guitar, singing into a microphone, swimming in a pool, holding a camera, climbing a
rock, skiing down a slope, snowboarding, surfing on a wave, skateboarding, digging in the sand, reading a book, eating
an ice cream, drinking from a bottle, cooking a meal, cutting a cake, dancing, splashing in the water, pulling a sledge,
pushing a cart, driving a car, paddling a canoe, sailing a boat, fishing, building a wall, painting a picture, sleeping
on a sofa, looking out of a window, talking on a telephone, carrying a bag, waving a flag, holding a baby, chewing a
stick, chasing a bird, sliding down a slide, swinging, waiting for a bus, selling fruit, crossing a street, wading
through a river, racing, fighting, clapping, laughing
"""
WEAR = "shirt, jacket, hat, coat, dress, helmet, cap, suit, uniform, sweater, scarf, swimsuit"
LOOKS = """
red, blue, green, yellow, black, white, brown, orange, pink, grey, small, large, old, wooden, striped, wet, colourful,
bright, dark, shiny
"""
WHERE = """
on the beach, in the water, on the grass, in the street, in the snow, in a park, in a field, at night, near a building,
in front of a wall, on a rock, in a room, on a table, by the river, in the mountains, on the road, in the air, at a
market, in the woods, under a tree
"""
"""What people, animals and things of a picture do, how they look and where they are, for sentences."""


def listed(words: str) -> list[str]:
    """Return the words of one of these lists."""
    return [word.replace("\n", " ").strip() for word in words.split(",")]
