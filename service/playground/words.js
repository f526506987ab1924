// Everyday words, by which the page names what lies together on the map.

export const WORDS = `a person;a child;a baby;a crowd;a couple;a portrait;a wedding;a party;a family;a singer;a dancer;a musician;a team;
a dog;a cat;a horse;a cow;a sheep;a bear;an elephant;a lion;a tiger;a zebra;a deer;a fox;a bird;a duck;an owl;a fish;a snake;an insect;a butterfly;a frog;a monkey;wild animals;farm animals;
a flower;a tree;a forest;grass;leaves;a garden;a field;mushrooms;a plant;
a mountain;snow;a beach;the sea;waves;a lake;a river;a waterfall;a desert;rocks;a cave;the sky;clouds;a sunset;the night;stars and galaxies;fog;rain;a storm;ice;fire;
a city;a street;a building;a house;a church;a castle;a bridge;a tower;a ruin;a market;a shop;a restaurant;a museum;a statue;a station;a harbour;a park;a playground;a swimming pool;a stadium;a farm;a factory;
a car;a bus;a train;a bicycle;a motorcycle;a boat;a ship;an aeroplane;a helicopter;a tractor;a lorry;a rocket;traffic;
football;basketball;tennis;skiing;snowboarding;surfing;swimming;climbing;running;cycling;skateboarding;a race;a jump;hiking;camping;fishing;
food;a meal;fruit;vegetables;bread;a cake;coffee;a drink;a bottle;
a kitchen;a bedroom;a living room;a bathroom;an office;a chair;a table;a lamp;furniture;a window;a door;a shelf;
a computer;a telephone;a camera;a book;a letter;a map;a drawing;a painting;a screenshot;a document;a sign;a diagram;coins;stamps;jewellery;clothes;shoes;toys;tools;a clock;a musical instrument;
music;singing;a guitar;a piano;drums;a violin;speech;laughter;crying;applause;footsteps;coughing;breathing;snoring;
barking;meowing;birdsong;crickets;a rooster;pouring water;dripping water;wind;thunder;crackling fire;bells;a siren;an alarm;a car horn;an engine;a vacuum cleaner;a washing machine;typing;a door knock;breaking glass;a saw;fireworks;noise;
black and white;a pattern;a texture;something red;something blue;something green;something yellow`
  .split(";").map((word) => word.trim());
