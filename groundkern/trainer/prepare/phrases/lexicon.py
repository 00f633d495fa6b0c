"""The English word lists of the rules: closed classes whole, of open ones what matters most."""

from __future__ import annotations


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _set("a an this that each every another either neither")
DETERMINERS = SINGULAR | _set(
    "the these those some any no several many few most much more fewer other various both all"
)
POSSESSIVES = _set("my your his her its our their whose")
PRONOUNS = _set(
    "i you he she it we they me him us them who whom which what there here someone somebody "
    "anyone everyone everybody something anything everything nothing himself herself itself "
    "themselves mine yours hers ours theirs one's where when why how"
)
PREPOSITIONS = _set(
    "of in on at by for with from to into onto over under above below behind beside besides "
    "between among through across along around near against toward towards upon inside outside "
    "within without during before after until since off out up down past like as beneath "
    "underneath alongside amid beyond per via despite except about than atop aboard while "
    "because if although though whether unless including excluding regarding concerning "
    "depending e.g. i.e. etc. vs. cf. versus"
)
AUXILIARIES = _set(
    "is are was were be been being am has have had having do does did can could will would "
    "shall should may might must cannot let's 're 've 'll 'm 'd 's"
)
MODALS = _set("can could will would shall should may might must do does did cannot 'll")
# After "the dog's", these say that it is "the dog is".
AFTER_IS = _set(
    "a an the this that these those my your his her its our their not no now also still just "
    "already always never too very so on in at by near behind under next been got gone about "
    "quite really likely probably being"
)
CONJUNCTIONS = _set("and or but nor so yet & plus")
ADVERBS = _set(
    "very quite too also not just only still then now away back together apart upside again "
    "ahead almost already always never often soon even ever once twice well rather perhaps "
    "forward sideways overhead nearby indoors outdoors yes no please slightly more most less "
    "least however therefore thus hence moreover furthermore meanwhile otherwise nevertheless "
    "nonetheless instead finally additionally indeed accordingly consequently similarly likewise "
    "afterwards afterward eventually else maybe anyway somewhat enough okay"
)
# Adverbs where a comma follows, adjectives before a noun.
CONJUNCTS = _set("overall next first second third last further similar alternatively")
APPROXIMATE = _set("about around nearly almost over roughly approximately exactly only under")
NUMBERS = _set(
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty "
    "hundred thousand million billion dozen first second third fourth fifth last next half"
)
MAGNITUDES = _set("hundred thousand million billion trillion")
MONTHS = _set(
    "january february march april may june july august september october november december"
)
WEEKDAYS = _set("monday tuesday wednesday thursday friday saturday sunday")
SHORT_DATES = _set("jan feb apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri")
QUANTITIES = _set("lot lots couple number bunch dozens hundreds thousands plenty variety")
ADJECTIVES = _set(
    "red orange yellow green blue purple pink brown black white gray grey golden silver beige "
    "dark light bright pale colorful colourful blond blonde striped small little tiny big large "
    "huge giant enormous tall short long wide narrow thick thin high low deep shallow old young "
    "new elderly ancient modern vintage antique fresh raw ripe hot cold warm cool wet dry clean "
    "dirty empty full open closed round square flat sharp smooth rough soft hard heavy happy "
    "sad angry cute beautiful pretty ugly nice good bad great fine busy quiet calm loud wooden "
    "plastic metallic stainless woolen different same similar single double several left right "
    "upper lower middle main public private local foreign urban rural wild tame bare blank "
    "clear cloudy sunny snowy rainy foggy sandy rocky grassy dusty muddy shiny fluffy furry "
    "fuzzy hairy leafy tasty lovely lonely friendly plain simple complex total whole entire "
    "previous current average daily weekly monthly annual yearly northern southern eastern "
    "western male female adult human live alive asleep awake alone available own such certain "
    "traditional electric acoustic digital stuffed broken worn torn lit hidden frozen fallen "
    "folded parked married retired abandoned incoming oncoming ongoing outdoor indoor"
)
ADJECTIVE_ENDINGS = ("ful", "ous", "less", "able", "ible", "ish", "ive", "ular")
NOT_ADJECTIVES = _set(
    "table vegetable cable fish dish radish relish british olive dive hive archive detective "
    "motive handful spoonful constable relative executive"
)
SUPERLATIVES_NOT = _set(
    "forest harvest nest guest chest west vest rest test request interest contest priest protest "
    "pest quest crest breakfast"
)
NOUNS_TOO = _set("total average adult human male female original orange white public individual")
LY_NOUNS = _set("family jelly italy reply supply butterfly fly belly lily bully ally assembly")
# Plurals that stand before a noun, as "company sales figures".
PLURAL_MODIFIERS = _set("sales sports goods arms news glasses sunglasses clothes savings")
# Verbs whose third person is rarely a plural noun; others are recognised by their neighbours.
VERBS = _set(
    "sit stand hold wear ride eat go run throw catch carry lie hang lean look watch wait jump "
    "fly swim climb drive pull push read write sing dance sleep smile laugh talk speak listen "
    "fill cook bake pour serve sell buy give take bring put get make become grow fall rise sink "
    "float sail row graze feed chase follow lead pass cross enter leave arrive depart approach "
    "reach touch grab kick hit toss swing bend kneel crouch stretch perform play pose gaze "
    "stare point appear seem contain include show depict display feature indicate represent "
    "illustrate compare describe suggest reveal increase decrease drop exceed equal remain stay "
    "keep belong consist cover surround overlook face rest stream shine glow burn blow pile "
    "celebrate gather walk stroll hike skate ski surf prepare repair build paint clean wash cut "
    "slice chop sniff lick bark wag rests hover land travel move turn open close start begin "
    "end stop use try help learn teach study work sign double triple see say pick "
    "list measure convey tap click select press scroll swipe check want need offer provide allow "
    "highlight emphasize emphasise mention add create evoke capture include involve vary differ "
    "decline dominate accompany illuminate reflect occupy feel believe know think"
)
PAST = _set(
    "sat stood held wore rode ate went ran threw caught lay hung flew swam drove sang slept "
    "spoke gave took brought got made became grew fell rose sank left led met kept began showed "
    "shown seen given taken worn thrown eaten driven ridden written built sold bought found "
    "known lit set sets lies dressed"
)
NOT_ING = _set(
    "building ceiling painting wedding clothing evening morning railing string ring king wing "
    "thing spring drawing lighting flooring icing frosting pudding dumpling duckling sibling "
    "sling herring earring awning landing crossing meeting opening setting wiring bedding "
    "filling heading packaging parking lettering seating bearing earnings stuffing siding "
    "flowering seasoning topping training"
)
NOT_ED = _set("bed shed seed weed speed feed sled reed breed hundred creed bobsled steed red")
PLURALS = _set(
    "people children men women sheep fish deer mice geese feet teeth police cattle oxen firemen "
    "policemen firefighters wolves knives leaves shelves loaves"
)
COMPLEX_TEXT = """
in front of, on top of, next to, because of, in order to, at least, at most, for example,
as well as, instead of, close to, out of, in between, far from, in addition to, such as, close up,
according to, in contrast, by contrast, as a result, as a whole, of course, in general,
in particular, in fact, in total, in conclusion, in summary, in short, in addition, for instance,
on the other hand, in other words, at the same time, at first, at last, due to, thanks to,
based on, so that, even though, rather than, in front, on average, in detail
"""
COMPLEX = sorted((tuple(words.split()) for words in COMPLEX_TEXT.split(",")), key=len, reverse=True)
