"""The answers of the demo: a paragraph in each of several languages, and the questions that they answer."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GERMAN", "GREEK", "ITALIAN", "JAPANESE", "LOOKUP", "PORTUGUESE", "Exchange"]


class Exchange(NamedTuple):
    """A question, its answer, and the reasoning before the answer."""

    question: str
    answer: str
    thoughts: str = ""


GERMAN = Exchange(
    "Wie mache ich guten Tee?",
    "Guter Tee braucht vor allem frisches Wasser und etwas Geduld. Wärmen Sie die Kanne vor, geben Sie für jede Tasse einen "
    "Löffel hinein und gießen Sie das Wasser auf, sobald es nicht mehr sprudelt. Grüner Tee zieht zwei Minuten, schwarzer drei "
    "bis vier. Danach die Blätter herausnehmen, sonst wird er bitter. Und dann: hinsetzen, nichts tun, trinken.",
)
JAPANESE = Exchange(
    "港の朝を描いてください。",
    "夜明けの港はまだ静かです。小さな船がひとつ、灯りを消して沖から戻ってきます。魚を待つ猫が三匹、石段に並んで座っています。"
    "やがて市場の戸が開き、氷の音と笑い声が聞こえてきます。パン屋の煙突から白い煙が上がり、町はゆっくりと目を覚まします。"
    "今日もまた、海の一日が始まります。",
)
GREEK = Exchange(
    "Γιατί είναι αλμυρή η θάλασσα;",
    "Η βροχή διαλύει λίγο λίγο τα πετρώματα της ξηράς και τα ποτάμια μεταφέρουν τα άλατα στη θάλασσα. Ο ήλιος εξατμίζει μόνο το "
    "νερό και τα άλατα μένουν πίσω. Ύστερα από εκατομμύρια χρόνια η θάλασσα έγινε τόσο αλμυρή όσο τη γνωρίζουμε σήμερα. Στους "
    "βυθούς, θερμές πηγές προσθέτουν ακόμη περισσότερα. Έτσι κάθε κύμα έχει μέσα του λίγη από τη γη.",
)
ITALIAN = Exchange(
    "Perché il cielo è azzurro?",
    "La luce del sole contiene tutti i colori. Quando attraversa l'aria, le molecole deviano la luce azzurra molto più di quella "
    "rossa: per questo l'azzurro ci arriva da ogni parte del cielo. Al tramonto la luce percorre più aria, l'azzurro si disperde "
    "lungo la strada e restano gli arancioni e i rossi. Sulla Luna, dove non c'è aria, il cielo è nero anche di giorno. E la sera, "
    "quando guardiamo l'orizzonte, vediamo la luce che altrove, nello stesso momento, sta illuminando il mattino di qualcun altro.",
    "La domanda riguarda la diffusione della luce. Spiego prima i colori, poi l'aria, poi il tramonto.",
)
PORTUGUESE = Exchange(
    "Conte a história de um rio.",
    "Era uma vez um rio que queria conhecer o mar. Perguntou às pedras, mas as pedras não viajam; perguntou ao vento, e o vento riu.",
)
LOOKUP = Exchange("What is the weather in Zürich?", "Let me look that up. ")
