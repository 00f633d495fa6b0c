"""Words of many scripts, numbers as in charts and tables, and words in punctuation."""

from __future__ import annotations

import random
from importlib.util import find_spec

WORDS = {
    "English": "time year people way day man thing woman life child world school state family "
    "student group country problem hand part place case week company system program question "
    "work government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name president team minute idea "
    "invoice total amount balance quarterly revenue population temperature".split(),
    "Chinese": "的 是 不 我们 他们 一个 没有 这个 中国 问题 公司 工作 时间 发展 自己 可以 进行 市场 "
    "经济 社会 政府 国家 企业 技术 服务 管理 学生 生活 北京 世界 系统 研究 网络 信息 产品 情况 "
    "数据 图表 比例 增长 收入 人口 温度 发票 金额 合计 日期 地址 电话 姓名 身份证 有限公司 饕餮 "
    "魑魅 囍 髦 龘 翡翠 蝙蝠 琥珀 麒麟 鹦鹉 枇杷 尴尬 踌躇 囹圄 耄耋 貔貅 氤氲 葳蕤 旖旎".split(),
    "Japanese": "こと もの 時間 日本 東京 問題 会社 仕事 世界 大学 研究 人口 売上 合計 請求書 金額 "
    "データ グラフ システム サービス コンピュータ テレビ ありがとう こんにちは お客様 株式会社 "
    "気温 割合 増加 ﾃﾞｰﾀ ｶﾀｶﾅ ｺﾝﾋﾟｭｰﾀ 消費税 領収書 住所 電話番号 令和 薔薇 躊躇 檸檬".split(),
    "Korean": "시간 사람 한국 서울 문제 회사 일 세계 대학교 연구 인구 매출 합계 청구서 금액 자료 "
    "그래프 시스템 서비스 컴퓨터 텔레비전 감사합니다 안녕하세요 고객 주식회사 기온 비율 증가 뷁 "
    "쀍 날짜 주소 전화번호 이름 영수증".split(),
    "Thai": "เวลา คน ประเทศไทย กรุงเทพ ปัญหา บริษัท งาน โลก มหาวิทยาลัย วิจัย ประชากร ยอดขาย รวม "
    "ใบแจ้งหนี้ จำนวนเงิน ข้อมูล กราฟ ระบบ บริการ คอมพิวเตอร์ ขอบคุณ สวัสดี ลูกค้า อุณหภูมิ อัตราส่วน เพิ่มขึ้น "
    "วันที่ ที่อยู่ โทรศัพท์ ชื่อ".split(),
    "Arabic": "وقت ناس العربية القاهرة مشكلة شركة عمل العالم جامعة بحث سكان مبيعات المجموع فاتورة "
    "مبلغ بيانات رسم نظام خدمة حاسوب شكرا مرحبا عميل درجة نسبة زيادة تاريخ عنوان هاتف اسم "
    "مُحَمَّد كِتَابٌ".split(),
    "Persian": "زمان مردم ایران تهران مشکل شرکت کار جهان دانشگاه پژوهش جمعیت فروش مجموع می‌شود "
    "نمی‌دانم کتاب‌ها داده سامانه خدمت رایانه".split(),
    "Hebrew": "זמן אנשים ישראל ירושלים בעיה חברה עבודה עולם אוניברסיטה מחקר אוכלוסייה מכירות "
    "חשבונית סכום נתונים מערכת שירות מחשב תודה שלום שָׁלוֹם צה״ל".split(),
    "Hindi": "समय लोग भारत दिल्ली समस्या कंपनी काम दुनिया विश्वविद्यालय अनुसंधान जनसंख्या बिक्री कुल चालान "
    "राशि आंकड़े प्रणाली सेवा कंप्यूटर धन्यवाद नमस्ते ग्राहक तापमान अनुपात वृद्धि दिनांक पता नाम क्षेत्र "
    "श्रीमान ज्ञान".split(),
    "Tamil": "நேரம் மக்கள் இந்தியா சென்னை பிரச்சனை நிறுவனம் வேலை உலகம் பல்கலைக்கழகம் ஆராய்ச்சி "
    "மக்கள்தொகை விற்பனை மொத்தம் தரவு அமைப்பு சேவை கணினி நன்றி வணக்கம்".split(),
    "Russian": "время люди Россия Москва проблема компания работа мир университет исследование "
    "население продажи итого счёт сумма данные график система услуга компьютер спасибо "
    "здравствуйте клиент температура доля рост дата адрес телефон имя ЁЖИК объём".split(),
    "Greek": "χρόνος άνθρωποι Ελλάδα Αθήνα πρόβλημα εταιρεία εργασία κόσμος πανεπιστήμιο έρευνα "
    "πληθυσμός πωλήσεις σύνολο τιμολόγιο ποσό δεδομένα σύστημα υπηρεσία υπολογιστής ευχαριστώ "
    "γεια πελάτης θερμοκρασία ποσοστό αύξηση ημερομηνία".split(),
    "Vietnamese": "thời gian người Việt Nam Hà Nội vấn đề công ty làm việc thế giới đại học nghiên "
    "cứu dân số doanh thu tổng cộng hóa đơn số tiền dữ liệu hệ thống dịch vụ máy tính".split(),
}
LANGUAGES = {
    "English": "en", "Chinese": "zh", "Japanese": "ja", "Korean": "ko", "Arabic": "ar",
    "Persian": "fa", "Hebrew": "he", "Hindi": "hi", "Tamil": "ta", "Russian": "ru", "Greek": "el",
    "Vietnamese": "vi",
}  # fmt: skip
WRAPS = ("({})", "[{}]", '"{}"', "“{}”", "‘{}’", "«{}»", "「{}」", "（{}）", "*{}*", "_{}_", "#{}",
         "{},", "{}.", "{}:", "{}…", "{}、", "{}。", "—{}", "- {}", "•{}", "¿{}?", "{}!")  # fmt: skip


def words(language: str, count: int) -> list[str]:
    """The most frequent words of a language by the package `wordfreq`, or those typed here.

    Args:
        language: one of WORDS.
        count: how many at most.

    Returns:
        Words without digits, most frequent first.
    """
    if language not in LANGUAGES or find_spec("wordfreq") is None:
        return WORDS[language][:count]
    import wordfreq

    frequent = wordfreq.top_n_list(LANGUAGES[language], 2 * count)
    if language == "Chinese":  # its list holds foreign words too
        frequent = [each for each in frequent if "\u3400" <= each[0] <= "\u9fff"]
    return [each for each in frequent if not any(map(str.isnumeric, each))][:count]


def numbers(count: int, *, seed: int = 0) -> list[str]:
    """Numbers as charts, tables, invoices and calendars have them.

    Args:
        count: how many.
        seed: of the choice.
    """
    dice = random.Random(seed)

    def integer() -> str:
        return str(round(10 ** dice.uniform(0, 6)))

    def grouped() -> str:
        return f"{round(10 ** dice.uniform(3, 7)):,}"

    def decimal() -> str:
        return f"{10 ** dice.uniform(-1, 4):.{dice.choice((1, 2, 3))}f}"

    def percent() -> str:
        return f"{dice.uniform(0, 100):.{dice.choice((0, 1, 2))}f}%"

    def currency() -> str:
        amount = f"{10 ** dice.uniform(0, 5):,.{dice.choice((0, 2))}f}"
        return dice.choice(("${}", "€{}", "£{}", "¥{}", "{}€", "({})", "-${}")).format(amount)

    def date() -> str:
        year, month, day = dice.randint(1950, 2030), dice.randint(1, 12), dice.randint(1, 28)
        forms = (f"{year}", f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year}")
        return dice.choice((*forms, f"{month}/{day}/{year % 100:02}", f"{year}/{month:02}"))

    def other() -> str:
        n = dice.randint(1, 400)
        minute, unit = dice.randint(0, 59), dice.choice(("k", "M", "kg", "cm", "°C", "x"))
        forms = (f"-{n}", f"+{n / 10:.1f}", f"±{n}", f"{n % 24}:{minute:02}", f"{n}{unit}")
        end = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, "th")
        return dice.choice((*forms, f"{n}{end}", f"#{n}", f"~{n}"))

    kinds = (integer, grouped, decimal, percent, currency, date, other)
    return [dice.choice(kinds)() for _ in range(count)]


def wrapped(texts: list[str]) -> list[str]:
    """Words with punctuation around them, each in another.

    Args:
        texts: the words.
    """
    return [WRAPS[index % len(WRAPS)].format(text) for index, text in enumerate(texts)]
