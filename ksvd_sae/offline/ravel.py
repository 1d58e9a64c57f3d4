"""A small RAVEL set of our own, in SAEBench's file format, where adamkarvonen/ravel_prompts cannot be downloaded.

Cities (country, continent, language) and Nobel laureates (country of birth, field, gender): the entities, facts and
prompts are written out here. It is a fraction of RAVEL's size, so scores are not comparable with RAVEL's own.
"""

import json
from pathlib import Path
from typing import Any

from ksvd_sae.store import atomic_path

NAME = "own-ravel"
# Every third entity and every third prompt is for validation, as far as SAEBench asks for it.
_EVERY_NTH_VALIDATES = 3

# country | continent | language | cities
_CITIES = """
France | Europe | French | Paris, Marseille, Lyon, Toulouse, Nice, Bordeaux, Lille
Germany | Europe | German | Berlin, Munich, Hamburg, Frankfurt, Cologne, Stuttgart, Leipzig
Austria | Europe | German | Vienna, Salzburg, Graz
Italy | Europe | Italian | Rome, Milan, Naples, Turin, Florence, Venice, Palermo
Spain | Europe | Spanish | Madrid, Seville, Valencia, Malaga, Zaragoza
Portugal | Europe | Portuguese | Lisbon, Porto
Poland | Europe | Polish | Warsaw, Krakow, Gdansk
Russia | Europe | Russian | Moscow, Saint Petersburg
Greece | Europe | Greek | Athens, Thessaloniki
Sweden | Europe | Swedish | Stockholm, Gothenburg, Malmo
Norway | Europe | Norwegian | Oslo, Bergen
Denmark | Europe | Danish | Copenhagen, Aarhus
Finland | Europe | Finnish | Helsinki, Tampere
Hungary | Europe | Hungarian | Budapest
Netherlands | Europe | Dutch | Amsterdam, Rotterdam, Utrecht
Ireland | Europe | English | Dublin, Cork
Romania | Europe | Romanian | Bucharest
Bulgaria | Europe | Bulgarian | Sofia
Ukraine | Europe | Ukrainian | Kyiv, Odessa
Turkey | Asia | Turkish | Ankara, Izmir
Japan | Asia | Japanese | Tokyo, Osaka, Kyoto, Nagoya, Sapporo, Hiroshima
China | Asia | Chinese | Beijing, Shanghai, Shenzhen, Wuhan, Chengdu, Nanjing
Thailand | Asia | Thai | Bangkok, Chiang Mai
Vietnam | Asia | Vietnamese | Hanoi, Da Nang
Indonesia | Asia | Indonesian | Jakarta, Surabaya, Bandung
Iran | Asia | Persian | Tehran, Isfahan, Shiraz
Iraq | Asia | Arabic | Baghdad, Basra
Saudi Arabia | Asia | Arabic | Riyadh, Jeddah
Israel | Asia | Hebrew | Tel Aviv, Haifa
India | Asia | Hindi | New Delhi, Mumbai, Jaipur, Lucknow
Pakistan | Asia | Urdu | Karachi, Lahore, Islamabad
Bangladesh | Asia | Bengali | Dhaka
Egypt | Africa | Arabic | Cairo, Alexandria, Giza
Morocco | Africa | Arabic | Casablanca, Rabat, Marrakesh
Algeria | Africa | Arabic | Algiers, Oran
Tunisia | Africa | Arabic | Tunis
Nigeria | Africa | English | Lagos, Abuja, Kano
Ghana | Africa | English | Accra
Kenya | Africa | Swahili | Nairobi, Mombasa
Tanzania | Africa | Swahili | Dodoma, Dar es Salaam
Ethiopia | Africa | Amharic | Addis Ababa
Senegal | Africa | French | Dakar
Angola | Africa | Portuguese | Luanda
Canada | North America | English | Toronto, Vancouver, Calgary, Ottawa, Edmonton
Mexico | North America | Spanish | Mexico City, Guadalajara, Monterrey, Tijuana
Cuba | North America | Spanish | Havana
Guatemala | North America | Spanish | Guatemala City
Brazil | South America | Portuguese | Sao Paulo, Rio de Janeiro, Brasilia, Salvador, Recife
Argentina | South America | Spanish | Buenos Aires, Rosario, Mendoza
Chile | South America | Spanish | Santiago, Valparaiso
Peru | South America | Spanish | Lima, Cusco
Colombia | South America | Spanish | Bogota, Medellin, Cali
Venezuela | South America | Spanish | Caracas, Maracaibo
Ecuador | South America | Spanish | Quito, Guayaquil
Uruguay | South America | Spanish | Montevideo
Australia | Oceania | English | Sydney, Melbourne, Brisbane, Perth, Adelaide
New Zealand | Oceania | English | Auckland, Wellington
"""
# country of birth | field | gender | laureates
_LAUREATES = """
Germany | Physics | male | Albert Einstein, Max Planck, Werner Heisenberg, Max von Laue, Gustav Hertz
Germany | Chemistry | male | Otto Hahn, Hermann Staudinger, Emil Fischer
Germany | Literature | male | Thomas Mann, Hermann Hesse, Heinrich Boll, Paul Heyse
Germany | Medicine | male | Robert Koch, Otto Warburg
Germany | Medicine | female | Christiane Nusslein-Volhard
Germany | Peace | male | Gustav Stresemann, Henry Kissinger
Austria | Physics | male | Erwin Schrodinger, Wolfgang Pauli, Victor Hess
Austria | Literature | female | Elfriede Jelinek
Austria | Literature | male | Peter Handke
Poland | Physics | female | Marie Curie
Poland | Literature | male | Henryk Sienkiewicz, Isaac Bashevis Singer
Poland | Literature | female | Wislawa Szymborska, Olga Tokarczuk
Poland | Peace | male | Lech Walesa
France | Physics | male | Pierre Curie, Henri Becquerel, Louis de Broglie, Jean Perrin, Pierre-Gilles de Gennes
France | Chemistry | female | Irene Joliot-Curie, Emmanuelle Charpentier
France | Chemistry | male | Henri Moissan, Victor Grignard, Jean-Marie Lehn
France | Literature | male | Andre Gide, Anatole France, Romain Rolland, Patrick Modiano
France | Literature | female | Annie Ernaux
France | Medicine | female | Francoise Barre-Sinoussi
France | Medicine | male | Luc Montagnier, Francois Jacob, Jacques Monod
Italy | Physics | male | Enrico Fermi, Guglielmo Marconi, Giorgio Parisi, Carlo Rubbia
Italy | Literature | male | Luigi Pirandello, Dario Fo, Eugenio Montale, Salvatore Quasimodo
Italy | Literature | female | Grazia Deledda
Italy | Medicine | male | Camillo Golgi, Renato Dulbecco
Italy | Medicine | female | Rita Levi-Montalcini
Denmark | Physics | male | Niels Bohr, Aage Bohr
Russia | Literature | male | Boris Pasternak, Alexander Solzhenitsyn, Mikhail Sholokhov, Joseph Brodsky, Ivan Bunin
Russia | Medicine | male | Ivan Pavlov
Russia | Physics | male | Pyotr Kapitsa, Vitaly Ginzburg, Igor Tamm
Russia | Peace | male | Andrei Sakharov, Mikhail Gorbachev
India | Literature | male | Rabindranath Tagore
India | Physics | male | C. V. Raman
India | Economics | male | Amartya Sen, Abhijit Banerjee
India | Peace | male | Kailash Satyarthi
Pakistan | Peace | female | Malala Yousafzai
Pakistan | Physics | male | Abdus Salam
Japan | Literature | male | Yasunari Kawabata, Kenzaburo Oe
Japan | Physics | male | Hideki Yukawa, Leo Esaki, Masatoshi Koshiba
Japan | Medicine | male | Shinya Yamanaka, Susumu Tonegawa, Yoshinori Ohsumi
Japan | Peace | male | Eisaku Sato
China | Literature | male | Mo Yan, Gao Xingjian
China | Medicine | female | Tu Youyou
China | Peace | male | Liu Xiaobo
Colombia | Literature | male | Gabriel Garcia Marquez
Colombia | Peace | male | Juan Manuel Santos
Chile | Literature | male | Pablo Neruda
Chile | Literature | female | Gabriela Mistral
Peru | Literature | male | Mario Vargas Llosa
Mexico | Literature | male | Octavio Paz
Guatemala | Peace | female | Rigoberta Menchu
South Africa | Peace | male | Nelson Mandela, Desmond Tutu, F. W. de Klerk
South Africa | Literature | male | J. M. Coetzee
South Africa | Literature | female | Nadine Gordimer
Kenya | Peace | female | Wangari Maathai
Liberia | Peace | female | Ellen Johnson Sirleaf, Leymah Gbowee
Ghana | Peace | male | Kofi Annan
Nigeria | Literature | male | Wole Soyinka
Egypt | Literature | male | Naguib Mahfouz
Egypt | Peace | male | Anwar Sadat, Mohamed ElBaradei
Iran | Peace | female | Shirin Ebadi, Narges Mohammadi
Sweden | Literature | female | Selma Lagerlof
Sweden | Literature | male | Tomas Transtromer, Par Lagerkvist
Sweden | Chemistry | male | Svante Arrhenius
Norway | Literature | male | Knut Hamsun, Jon Fosse
Canada | Literature | female | Alice Munro
Canada | Physics | female | Donna Strickland
Canada | Medicine | male | Frederick Banting
"""
_PROMPTS: dict[str, dict[str, list[str]]] = {
    "city": {
        "Country": [
            '[{"city": "Paris", "country": "France"}, {"city": "%s", "country": "',
            "Toronto is in the country of Canada. %s is in the country of",
            "City: Rome. Country: Italy. City: %s. Country:",
            "The city of Athens lies in Greece, the city of %s lies in",
            "People from Lisbon live in Portugal. People from %s live in",
            "Madrid, Spain. Warsaw, Poland. %s,",
        ],
        "Continent": [
            '[{"city": "Paris", "continent": "Europe"}, {"city": "%s", "continent": "',
            "Toronto is on the continent of North America. %s is on the continent of",
            "City: Nairobi. Continent: Africa. City: %s. Continent:",
            "Tokyo is a city in Asia. Lima is a city in South America. %s is a city in",
            "On a map, Rome is found in Europe, Cairo is found in Africa, %s is found in",
            "Lagos: Africa. Beijing: Asia. Quito: South America. %s:",
        ],
        "Language": [
            '[{"city": "Paris", "official language": "French"}, {"city": "%s", "official language": "',
            "In Berlin people speak German. In %s people speak",
            "City: Rome. Language: Italian. City: %s. Language:",
            "The official language of Tokyo is Japanese, the official language of %s is",
            "Street signs in Moscow are in Russian, street signs in %s are in",
            "Lisbon: Portuguese. Athens: Greek. %s:",
        ],
    },
    "nobel_prize_winner": {
        "Country of Birth": [
            '[{"name": "Ernest Rutherford", "country of birth": "New Zealand"}, {"name": "%s", "country of birth": "',
            "Ernest Hemingway was born in the United States. %s was born in",
            "Laureate: Frederick Sanger. Born in: England. Laureate: %s. Born in:",
            "Harald zur Hausen comes from Germany, %s comes from",
            "The country of birth of Elie Wiesel is Romania. The country of birth of %s is",
            "Samuel Beckett, Ireland. Saint-John Perse, France. %s,",
        ],
        "Field": [
            '[{"name": "Ernest Hemingway", "Nobel Prize in": "Literature"}, {"name": "%s", "Nobel Prize in": "',
            "Richard Feynman won the Nobel Prize in Physics. %s won the Nobel Prize in",
            "Laureate: Linus Pauling. Field: Chemistry. Laureate: %s. Field:",
            "Paul Dirac was honoured in the field of Physics, %s was honoured in the field of",
            "Mother Teresa: Peace. William Faulkner: Literature. Francis Crick: Medicine. %s:",
            "The award for Samuel Beckett was in Literature. The award for %s was in",
        ],
        "Gender": [
            '[{"name": "Richard Feynman", "gender": "male"}, {"name": "%s", "gender": "',
            "The gender of Mother Teresa is female. The gender of %s is",
            "Laureate: Toni Morrison. Gender: female. Laureate: %s. Gender:",
            "Doris Lessing: female. Paul Dirac: male. Dorothy Hodgkin: female. %s:",
            "On the form for Barbara McClintock, sex is female. On the form for %s, sex is",
            "Name: Linus Pauling, sex: male. Name: %s, sex:",
        ],
    },
}
_TABLES = {"city": _CITIES, "nobel_prize_winner": _LAUREATES}
ENTITY_ATTRIBUTES = {entity: list(prompts) for entity, prompts in _PROMPTS.items()}


def entities(kind: str) -> dict[str, dict[str, str]]:
    """Entity -> attribute -> label, of 'city' or 'nobel_prize_winner'."""
    entities: dict[str, dict[str, str]] = {}
    for line in _TABLES[kind].strip().splitlines():
        *labels, names = (part.strip() for part in line.split("|"))
        for name in names.split(","):
            entities[name.strip()] = dict(zip(_PROMPTS[kind], labels, strict=True))
    return entities


def prompts(kind: str) -> dict[str, list[str]]:
    """Attribute -> prompts with %s for the entity; the completion should begin with the label."""
    return {attribute: list(templates) for attribute, templates in _PROMPTS[kind].items()}


def write_files(folder: Path) -> None:
    """The four JSON files of each kind that SAEBench's RAVEL reads, into ``folder``/base."""
    for kind in _PROMPTS:
        known, templates = entities(kind), prompts(kind)
        texts = [template for group in templates.values() for template in group]
        files: dict[str, Any] = {
            "entity_attributes": known,
            "attribute_to_prompts": templates,
            "entity_to_split": _split(list(known)),
            "prompt_to_split": _split(texts),
        }
        for name, content in files.items():
            with atomic_path(folder / "base" / f"ravel_{kind}_{name}.json") as temporary:
                temporary.write_text(json.dumps(content, indent=1))


def _split(items: list[str]) -> dict[str, str]:
    return {item: "val" if i % _EVERY_NTH_VALIDATES == 2 else "train" for i, item in enumerate(items)}
